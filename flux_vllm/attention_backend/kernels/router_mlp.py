"""The Layer Router on the GPU: pooled features to routes in two launches.

A router is five small matrices for a handful of requests; as separate operators its time would be
launches. Nothing non-linear stands between `features.2` and `head.0`: their product is taken when
the weights are loaded. The first kernel spreads the 8H hidden units over programs, each with its
share of that product; the second adds the shares up, runs the rest of the head, decides, and
switches the decided rows between the passes of this layer.

Dimension legend: P prompt rows, L layers, U route slots, R rows of the batch, H head dim.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route

SLICES = 32
"""Programs that share the features of one request."""

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
    """What the rows of the batch need to change passes, for one layer."""

    seq_lens: torch.Tensor
    """[R] int32."""
    query_start_loc: torch.Tensor
    """[R + 1] int32."""
    full_seqused_q: torch.Tensor
    """[R] int32, out for decided rows: queries in the full pass of this layer."""
    sparse_seqused_q: torch.Tensor
    """[R] int32, out for decided rows: queries in the sparse pass of this layer."""


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


def router_workspace(max_rows: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Allocate what the two launches hand over, for up to `max_rows` prompt rows."""
    return torch.empty(max_rows, SLICES, 4 * head_dim, device=device)


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
    *,
    sparse_beyond_tokens: int,
) -> None:
    """Route the rows that are to be routed, in one layer.

    Args:
        pooled: [P, H] float32, pooled query features; with tensor parallelism, of all heads.
        rows: [P, COLUMNS] int32, see `prompt_rows`.
        num_rows: P.
        weights: of all layers.
        layer: index into `weights`.
        column: index of the layer in `tables`.
        threshold: FULL where P(FULL) reaches it.
        tables: written for the routed rows' slots.
        switch: written for the routed rows.
        workspace: of `router_workspace`.
        sparse_beyond_tokens: sink_tokens + window_tokens; up to so many keys both routes are the
            same and the row stays in the full pass.

    Host sync: none; allocates nothing.
    """
    if num_rows == 0:
        return
    head_dim = pooled.shape[1]
    width = triton.next_power_of_2(head_dim)
    shared = {"H": head_dim, "W": width, "SLICES": SLICES}
    _features_kernel[(num_rows, SLICES)](
        pooled,
        rows,
        *weights.hidden,
        weights.joint[0],
        workspace,
        layer,
        **shared,
        num_warps=4,
    )
    _decide_kernel[(num_rows,)](
        rows,
        workspace,
        weights.joint[1],
        *weights.head_2,
        *weights.head_4,
        tables.routes,
        tables.full_probability,
        *switch,
        layer,
        column,
        threshold,
        sparse_beyond_tokens,
        tables.routes.stride(0),
        tables.full_probability.stride(0),
        **shared,
        num_warps=8,
    )


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _matvec(weight, x, out_index, out_valid, in_index, in_valid, INPUTS: tl.constexpr):
    """Multiply some rows of a matrix [outputs, INPUTS] by some of its inputs."""
    tile = tl.load(
        weight + out_index[:, None] * INPUTS + in_index[None, :],
        mask=out_valid[:, None] & in_valid[None, :],
        other=0.0,
    )
    return tl.sum(tile * x[None, :], axis=1)


@triton.jit(do_not_specialize=["layer"])
def _features_kernel(
    pooled,
    rows,
    weight_0,
    bias_0,
    joint,
    workspace,
    layer,
    H: tl.constexpr,
    W: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(rows + row * 8 + 4) == 0:
        return
    share = tl.program_id(1)
    d = tl.arange(0, W)
    x = tl.load(pooled + row * H + d, mask=d < H, other=0.0)
    units: tl.constexpr = 8 * H // SLICES
    unit_width: tl.constexpr = triton.next_power_of_2(units)
    local = tl.arange(0, unit_width)
    mine = local < units
    unit = share * units + local
    layer = layer.to(tl.int64)
    hidden = _matvec(weight_0 + layer * 8 * H * H, x, unit, mine, d, d < H, H)
    hidden += tl.load(bias_0 + layer * 8 * H + unit, mask=mine, other=0.0)
    hidden = tl.where(mine, _silu(hidden), 0.0)
    joint += layer * 32 * H * H
    target = workspace + (row * SLICES + share) * 4 * H
    for begin in range(0, 4 * H, W):
        out = begin + d
        share_of = _matvec(joint, hidden, out, out < 4 * H, unit, mine, 8 * H)
        tl.store(target + out, share_of, mask=out < 4 * H)


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
    layer,
    column,
    threshold,
    sparse_beyond,
    stride_routes,
    stride_probability,
    H: tl.constexpr,
    W: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(rows + row * 8 + 4) == 0:
        return
    layer = layer.to(tl.int64)
    d = tl.arange(0, W)
    in_head = d < H
    share = tl.arange(0, SLICES)
    weight_h2 += layer * 4 * H * H
    last = tl.zeros([W], tl.float32)
    for begin in range(0, 4 * H, W):
        unit = begin + d
        in_use = unit < 4 * H
        shares = workspace + (row * SLICES + share)[:, None] * 4 * H + unit[None, :]
        hidden = tl.sum(tl.load(shares, mask=in_use[None, :], other=0.0), axis=0)
        hidden += tl.load(bias_joint + layer * 4 * H + unit, mask=in_use, other=0.0)
        hidden = tl.where(in_use, _silu(hidden), 0.0)
        last += _matvec(weight_h2, hidden, d, in_head, unit, in_use, 4 * H)
    last += tl.load(bias_h2 + layer * H + d, mask=in_head, other=0.0)
    last = tl.where(in_head, _silu(last), 0.0)
    head = weight_h4 + layer * 2 * H + d
    sparse = tl.sum(last * tl.load(head + _SPARSE * H, mask=in_head, other=0.0), axis=0)
    full = tl.sum(last * tl.load(head + _FULL * H, mask=in_head, other=0.0), axis=0)
    sparse += tl.load(bias_h4 + layer * 2 + _SPARSE)
    full += tl.load(bias_h4 + layer * 2 + _FULL)
    probability = 1.0 / (1.0 + tl.exp(sparse - full))
    route = tl.where(probability >= threshold, _FULL, _SPARSE)

    slot = tl.load(rows + row * 8 + 5).to(tl.int64)
    tl.store(full_probability + slot * stride_probability + column, probability)
    tl.store(routes + slot * stride_routes + column, route.to(tl.int8))
    batch_row = tl.load(rows + row * 8 + 3)
    queries = tl.load(query_start_loc + batch_row + 1) - tl.load(query_start_loc + batch_row)
    apart = (route == _SPARSE) & (tl.load(seq_lens + batch_row) > sparse_beyond)
    tl.store(full_seqused_q + batch_row, tl.where(apart, 0, queries))
    tl.store(sparse_seqused_q + batch_row, tl.where(apart, queries, 0))
