"""The Layer Router on the GPU: pooled features to routes in two launches.

A router is five small matrices for a handful of requests; as separate operators its time would be
launches. Nothing non-linear stands between `features.2` and `head.0`: their product is taken when
the weights are loaded. The first kernel spreads the 8H hidden units over programs, each with its
share of that product; the second spreads the next 4H units, and the program that comes last ends
the head, decides, and switches the decided rows between the passes of this layer.

Dimension legend: P prompt rows, L layers, U route slots, R rows of the batch, H head dim.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.tiles import power_of_two
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route

SLICES = 32
"""Programs that share the features of one request."""

_HEAD_PARTS = 8
"""Programs that share the head of one request, where one layer is decided."""

_FULL = tl.constexpr(int(Route.FULL))
_SPARSE = tl.constexpr(int(Route.SPARSE))


class RouterWeights(NamedTuple):
    """Parameters of all layers, stacked and contiguous, float32."""

    hidden: tuple[torch.Tensor, torch.Tensor]
    """`features.0`: [L, 8H, H], [L, 8H]."""
    joint: tuple[torch.Tensor, torch.Tensor]
    """`head.0` after `features.2`: [L, 4H, 8H], [L, 4H]."""
    head_2: tuple[torch.Tensor, torch.Tensor]
    """[L, H, 4H], [L, H]."""
    head_4: tuple[torch.Tensor, torch.Tensor]
    """[L, 2, H], [L, 2]."""


class RouteTables(NamedTuple):
    """What a decision is written to."""

    routes: torch.Tensor
    """[U, layers of the model] int8 of `Route` values."""
    full_probability: torch.Tensor
    """[U, layers of the model] float32."""


class RowSwitch(NamedTuple):
    """What the rows of the batch need to change passes in the layer that is decided."""

    seq_lens: torch.Tensor
    """[R] int32."""
    query_start_loc: torch.Tensor
    """[R + 1] int32."""
    full_seqused_q: torch.Tensor
    """[R] int32, out for decided rows: queries in the full pass."""
    sparse_seqused_q: torch.Tensor
    """[R] int32, likewise: queries in the sparse pass."""
    sparse_beyond_tokens: int
    """Up to so many keys both routes are the same and the row stays in the full pass."""


def router_weights(router: LayerRouter, device: torch.device) -> RouterWeights:
    """Copy a router's parameters to the device."""

    def linear(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = router.linear(name)
        return weight.detach().double(), bias.detach().double()

    def place(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight.to(device, torch.float32), bias.to(device, torch.float32)

    inner, outer = linear("features.2"), linear("head.0")
    joint = outer[0] @ inner[0], (outer[0] @ inner[1][..., None])[..., 0] + outer[1]
    return RouterWeights(
        place(*linear("features.0")),
        place(*joint),
        place(*linear("head.2")),
        place(*linear("head.4")),
    )


def router_workspace(entries: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Allocate what the launches hand over: an entry a prompt row, times layers decided at once."""
    return torch.empty(entries, SLICES, 4 * head_dim, device=device)


def decide_routes(
    pooled: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    weights: RouterWeights,
    layer: int,
    column: int,
    threshold: float,
    tables: RouteTables,
    switch: RowSwitch,
    workspace: torch.Tensor,
) -> None:
    """Route the rows that are to be routed, in one layer.

    Args:
        pooled: [P, H] float32, pooled query features; with tensor parallelism, of all heads.
        rows: [P, COLUMNS] int32, see `prompt_rows`; the spare column counts programs and is 0
            before and after.
        num_rows: P.
        weights: of all layers.
        layer: index into `weights`.
        column: index of the layer in `tables`.
        threshold: FULL where P(FULL) reaches it.
        tables: written for the routed rows' slots.
        switch: written for the routed rows.
        workspace: of `router_workspace`.

    Host sync: none; allocates nothing.
    """
    _launch(
        pooled, rows, (num_rows, 1), weights, None, layer, column, threshold, tables, switch,
        workspace,
    )  # fmt: skip


def decide_layers(
    pooled: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    weights: RouterWeights,
    layer_columns: torch.Tensor,
    threshold: float,
    tables: RouteTables,
    workspace: torch.Tensor,
) -> None:
    """Route the rows that are to be routed in several layers at once, after the last of them.

    For steps in which no route matters to the step itself: no row has to change passes. Two
    launches then serve all layers.

    Args:
        pooled: [L * P, H] float32, as `pool_rows` leaves it.
        rows: see `decide_routes`.
        num_rows: P.
        weights: of all layers of the model.
        layer_columns: [L] int32 on the device: the layers, as indices into `weights` and `tables`.
        threshold: see `decide_routes`.
        tables: written for the routed rows' slots.
        workspace: of L * P entries.

    Host sync: none; allocates nothing.
    """
    grid = (num_rows, layer_columns.shape[0])
    _launch(
        pooled, rows, grid, weights, layer_columns, 0, 0, threshold, tables, None, workspace
    )  # fmt: skip


def _launch(
    pooled: torch.Tensor,
    rows: torch.Tensor,
    grid: tuple[int, int],
    weights: RouterWeights,
    layer_columns: torch.Tensor | None,
    layer: int,
    column: int,
    threshold: float,
    tables: RouteTables,
    switch: RowSwitch | None,
    workspace: torch.Tensor,
) -> None:
    num_rows, layers = grid
    if num_rows == 0:
        return
    assert workspace.shape[0] >= num_rows * layers, "workspace too small"
    head_dim = pooled.shape[1]
    width, joint_width = (power_of_two(n * head_dim) for n in (1, 4))
    shared = {"H": head_dim, "W": width, "SLICES": SLICES}
    _features_kernel[(num_rows, SLICES, layers)](
        pooled,
        rows,
        *weights.hidden,
        weights.joint[0],
        workspace,
        layer_columns,
        layer,
        JOINT=joint_width,
        **shared,
        num_warps=8,
    )
    # Many layers at once fill the GPU by themselves.
    parts = _HEAD_PARTS if layers == 1 else 1
    units = 4 * head_dim // parts
    _decide_kernel[(num_rows, layers, parts)](
        rows,
        workspace,
        weights.joint[1],
        *weights.head_2,
        *weights.head_4,
        tables.routes,
        tables.full_probability,
        *(switch or (None, None, None, None, 0)),
        layer_columns,
        layer,
        column,
        threshold,
        tables.routes.stride(0),
        tables.full_probability.stride(0),
        PARTS=parts,
        UNITS=units,
        CHUNK=min(power_of_two(units), 8_192 // width),
        **shared,
        num_warps=4,
    )


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _load_matrix(weight, out, out_valid, unit, unit_valid, INPUTS: tl.constexpr):
    """Load some rows and columns of a matrix [outputs, INPUTS]."""
    return tl.load(
        weight + out[:, None] * INPUTS + unit[None, :],
        mask=out_valid[:, None] & unit_valid[None, :],
        other=0.0,
    )


@triton.jit(do_not_specialize=["layer"])
def _features_kernel(
    pooled,
    rows,
    weight_0,
    bias_0,
    joint,
    workspace,
    layer_columns,
    layer,
    H: tl.constexpr,
    W: tl.constexpr,
    JOINT: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(rows + row * 8 + 4) == 0:
        return
    share = tl.program_id(1)
    entry = tl.program_id(2) * tl.num_programs(0) + row
    if layer_columns is not None:
        layer = tl.load(layer_columns + tl.program_id(2))
    layer = layer.to(tl.int64)
    units: tl.constexpr = 8 * H // SLICES
    local = tl.arange(0, triton.next_power_of_2(units))
    mine = local < units
    unit = share * units + local
    d = tl.arange(0, W)
    out = tl.arange(0, JOINT)
    # All loads before the first sum: the weights come from memory, one latency is enough.
    second = _load_matrix(joint + layer * 32 * H * H, out, out < 4 * H, unit, mine, 8 * H)
    first = _load_matrix(weight_0 + layer * 8 * H * H, unit, mine, d, d < H, H)
    hidden = tl.load(bias_0 + layer * 8 * H + unit, mask=mine, other=0.0)
    x = tl.load(pooled + entry * H + d, mask=d < H, other=0.0)
    hidden += tl.sum(first * x[None, :], axis=1)
    hidden = tl.where(mine, _silu(hidden), 0.0)
    target = workspace + (entry * SLICES + share) * 4 * H + out
    tl.store(target, tl.sum(second * hidden[None, :], axis=1), mask=out < 4 * H)


@triton.jit(do_not_specialize=["layer", "column", "sparse_beyond"])
def _decide_kernel(
    rows,
    workspace,
    bias_joint,
    weight_h2,
    bias_h2,
    weight_h4,
    bias_h4,
    routes,
    full_probability,
    seq_lens,
    query_start_loc,
    full_seqused_q,
    sparse_seqused_q,
    sparse_beyond,
    layer_columns,
    layer,
    column,
    threshold,
    stride_routes,
    stride_probability,
    H: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(rows + row * 8 + 4) == 0:
        return
    entry = tl.program_id(1) * tl.num_programs(0) + row
    if layer_columns is not None:
        layer = tl.load(layer_columns + tl.program_id(1))
        column = layer
    layer = layer.to(tl.int64)
    d = tl.arange(0, W)
    in_head = d < H
    share = tl.arange(0, SLICES)
    part = tl.program_id(2)
    shares = workspace + entry * SLICES * 4 * H
    weight_h2 += layer * 4 * H * H
    head = weight_h4 + layer * 2 * H + d
    to_sparse = tl.load(head + _SPARSE * H, mask=in_head, other=0.0)
    to_full = tl.load(head + _FULL * H, mask=in_head, other=0.0)
    last = tl.zeros([W], tl.float32)
    for begin in tl.static_range(0, UNITS, CHUNK):
        local = begin + tl.arange(0, CHUNK)
        in_use = local < UNITS
        unit = part * UNITS + local
        weight = _load_matrix(weight_h2, d, in_head, unit, in_use, 4 * H)
        hidden = tl.load(
            shares + share[:, None] * 4 * H + unit[None, :], mask=in_use[None, :], other=0.0
        )
        hidden = tl.sum(hidden, axis=0)
        hidden += tl.load(bias_joint + layer * 4 * H + unit, mask=in_use, other=0.0)
        last += tl.sum(weight * tl.where(in_use, _silu(hidden), 0.0)[None, :], axis=1)
    if PARTS > 1:
        # A part's result takes the place of the shares that it alone has read.
        place = shares + (d // UNITS) * 4 * H + d % UNITS
        tl.debug_barrier()
        tl.store(place + part * UNITS, last, mask=in_head)
        tl.debug_barrier()
        if tl.atomic_add(rows + row * 8 + 7, 1, sem="acq_rel") != PARTS - 1:
            return
        tl.store(rows + row * 8 + 7, 0)
        every = place[None, :] + tl.arange(0, PARTS)[:, None] * UNITS
        last = tl.load(every, mask=in_head[None, :], other=0.0, cache_modifier=".cg")
        last = tl.sum(last, axis=0)
    last += tl.load(bias_h2 + layer * H + d, mask=in_head, other=0.0)
    last = tl.where(in_head, _silu(last), 0.0)
    sparse = tl.sum(last * to_sparse, axis=0) + tl.load(bias_h4 + layer * 2 + _SPARSE)
    full = tl.sum(last * to_full, axis=0) + tl.load(bias_h4 + layer * 2 + _FULL)
    difference = sparse - full
    probability = 1.0 / (1.0 + tl.exp(difference))
    # Logits that are not finite give NaN, as softmax does, and NaN is FULL.
    probability = tl.where(tl.abs(difference) < float("inf"), probability, float("nan"))
    route = tl.where(probability < threshold, _SPARSE, _FULL)

    slot = tl.load(rows + row * 8 + 5).to(tl.int64)
    tl.store(full_probability + slot * stride_probability + column, probability)
    tl.store(routes + slot * stride_routes + column, route.to(tl.int8))
    if full_seqused_q is not None:
        batch_row = tl.load(rows + row * 8 + 3)
        queries = tl.load(query_start_loc + batch_row + 1) - tl.load(query_start_loc + batch_row)
        apart = (route == _SPARSE) & (tl.load(seq_lens + batch_row) > sparse_beyond)
        tl.store(full_seqused_q + batch_row, tl.where(apart, 0, queries))
        tl.store(sparse_seqused_q + batch_row, tl.where(apart, queries, 0))
