"""Query sums and pooling on the GPU, one layer: what `flux_vllm.router.state` does on the CPU.

Two launches: one adds this step's queries, rotated back and averaged over heads, to the sums of
their granules and notes what the routed rows pool of them; the next pools. The second may read
what the first wrote for another row: rows of one step share blocks of the prefix cache.

Dimension legend: P prompt rows, T packed tokens, N query heads, H head dim, G granules of the KV
cache, M block-table width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.prompt_rows import (
    PooledStep,
    find_granule,
    physical_granule,
    pool_slots,
    pooled_range,
)
from flux_vllm.router.features import GRANULE_TOKENS

_GRANULE = tl.constexpr(GRANULE_TOKENS)


class InverseRotary(NamedTuple):
    """How to rotate queries back: by tables, or by frequencies where tables are None."""

    rotary_dim: int
    interleaved: bool
    """Whether the pairs are (0, 1), (2, 3), ... (GPT-J) and not two halves (NeoX)."""
    inv_freq: torch.Tensor | None = None
    """[rotary_dim / 2] float32; cos and sin are computed from position * inv_freq."""
    attention_scaling: float = 1.0
    """Factor m that the rotation put on cos and sin (YaRN); used with inv_freq."""
    cos: torch.Tensor | None = None
    """[positions, rotary_dim / 2] float32, divided by m squared."""
    sin: torch.Tensor | None = None


class PoolingWorkspace(NamedTuple):
    """What the two launches of a layer hand over; one serves all layers."""

    parts: torch.Tensor
    """[P, 2, SLOTS, H] float32: this step's share of each pooled granule, by end of the prompt."""
    straddled: torch.Tensor
    """[P, H] float32: sum, before this step, of the granule that a row's chunk begins within."""


def pooling_workspace(
    max_rows: int, pool_tokens: int, head_dim: int, device: torch.device
) -> PoolingWorkspace:
    """Allocate a workspace for up to `max_rows` prompt rows."""
    slots = pool_slots(pool_tokens)
    return PoolingWorkspace(
        torch.empty(max_rows, 2, slots, head_dim, device=device),
        torch.empty(max_rows, head_dim, device=device),
    )


def update_and_pool(
    query: torch.Tensor,
    sums: torch.Tensor,
    counts: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    step: PooledStep,
    workspace: PoolingWorkspace,
    rotary: InverseRotary,
    pooled: torch.Tensor,
    num_rows: int,
    num_programs: int,
    *,
    block_size: int,
    pool_tokens: int,
) -> None:
    """Add this step's prompt queries to a layer's sums, then pool the routed rows.

    Args:
        query: [>= T, N, H] after RoPE, any float type, last dimension contiguous.
        sums: [G, H] bfloat16, in and out: this layer's query sums.
        counts: [G] uint8, after `update_counts`.
        slot_mapping: [>= T] int64.
        block_table: [rows of the batch, M] int32.
        step: after `update_counts`.
        workspace: for at least P rows.
        rotary: of the layer.
        pooled: [P, H] float32, out: mean query before RoPE over this rank's heads; written for
            routed rows only.
        num_rows: P.
        num_programs: of PackedRows.
        block_size: tokens a block, a multiple of 16.
        pool_tokens: tokens pooled at each end of a prompt.

    Host sync: none; allocates nothing.
    """
    if num_rows == 0:
        return
    heads, head_dim = query.shape[1:]
    slots = pool_slots(pool_tokens)
    pairs = rotary.rotary_dim // 2
    _write_kernel[(num_programs,)](
        query,
        sums,
        slot_mapping,
        step.rows,
        step.straddle_counts,
        workspace.parts,
        workspace.straddled,
        rotary.inv_freq,
        rotary.cos,
        rotary.sin,
        1.0 / rotary.attention_scaling,
        1.0 / heads,
        num_rows,
        *query.stride()[:2],
        HEADS=heads,
        HEAD_DIM=head_dim,
        PAIRS=pairs,
        BLOCK_PAIRS=triton.next_power_of_2(pairs),
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * pairs)),
        INTERLEAVED=rotary.interleaved,
        POOL_TOKENS=pool_tokens,
        SLOTS=slots,
        num_warps=8,
    )
    _pool_kernel[(num_rows,)](
        sums,
        counts,
        block_table,
        step.rows,
        step.straddle_counts,
        step.pooled_tokens,
        workspace.parts,
        workspace.straddled,
        pooled,
        block_table.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        GRANULES_PER_BLOCK=block_size // GRANULE_TOKENS,
        POOL_TOKENS=pool_tokens,
        SLOTS=slots,
        num_warps=4,
    )


@triton.jit
def _mean_over_heads(
    query, token, valid, dim, dim_valid, weight, stride_t, stride_n, HEADS: tl.constexpr
):
    """Average some dimensions of 16 tokens' queries over heads: [16, dims] float32."""
    at_once: tl.constexpr = 8 if HEADS >= 8 else HEADS
    group: tl.constexpr = triton.next_power_of_2(at_once)
    total = tl.zeros([_GRANULE, dim.shape[0]], tl.float32)
    for begin in range(0, HEADS, group):
        head = begin + tl.arange(0, group)
        pointers = (
            query
            + head[:, None, None] * stride_n
            + (token * stride_t)[None, :, None]
            + dim[None, None, :]
        )
        loaded = (head < HEADS)[:, None, None] & valid[None, :, None] & dim_valid[None, None, :]
        total += tl.sum(tl.load(pointers, mask=loaded, other=0.0).to(tl.float32), axis=0)
    return total * weight


@triton.jit
def _add_sum(sums, slot, dim, dim_valid, x, old, HEAD_DIM: tl.constexpr):
    """Write a granule's new sum: the old one plus this step's queries."""
    if slot >= 0:
        target = sums + slot // _GRANULE * HEAD_DIM + dim
        tl.store(target, (old + tl.sum(x, axis=0)).to(sums.dtype.element_ty), mask=dim_valid)


@triton.jit
def _old_sum(
    sums, slot, straddled, row, continues, has_sum, dim, dim_valid, HEAD_DIM: tl.constexpr
):
    """Read the sum of a granule that this step goes on with, and keep it for the pooling."""
    old = tl.zeros([dim.shape[0]], tl.float32)
    if continues:
        if has_sum & (slot >= 0):
            source = sums + slot // _GRANULE * HEAD_DIM + dim
            old = tl.load(source, mask=dim_valid, other=0.0).to(tl.float32)
        tl.store(straddled + row * HEAD_DIM + dim, old, mask=dim_valid)
    return old


@triton.jit
def _add_parts(
    parts, row, granule, position, end, dim, dim_valid, x, valid,
    POOL_TOKENS: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Note what the ends of the prompt pool of this granule's queries in this step."""
    for which in tl.static_range(2):
        begin, stop = pooled_range(end, which, POOL_TOKENS)
        counted = valid & (position >= begin) & (position < stop)
        slot = granule - begin // _GRANULE
        if tl.max(counted.to(tl.int32), axis=0) > 0:
            part = tl.sum(tl.where(counted[:, None], x, 0.0), axis=0)
            target = parts + ((row * 2 + which) * SLOTS + slot).to(tl.int64) * HEAD_DIM + dim
            tl.store(target, part, mask=dim_valid)


@triton.jit(do_not_specialize=["num_rows"])
def _write_kernel(
    query,
    sums,
    slot_mapping,
    rows,
    straddle_counts,
    parts,
    straddled,
    inv_freq,
    cos_table,
    sin_table,
    turn_scale,
    head_weight,
    num_rows,
    stride_t,
    stride_n,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POOL_TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row, granule = find_granule(rows, tl.program_id(0), num_rows)
    computed = tl.load(rows + row * 8 + 1)
    end = computed + tl.load(rows + row * 8 + 2)
    routed = tl.load(rows + row * 8 + 4) != 0
    position = granule * _GRANULE + tl.arange(0, _GRANULE)
    valid = (position >= computed) & (position < end)
    token = (tl.load(rows + row * 8) + position - computed).to(tl.int64)
    begin = tl.maximum(granule * _GRANULE, computed)
    slot = tl.load(slot_mapping + tl.load(rows + row * 8) + begin - computed)
    continues = begin % _GRANULE != 0
    has_sum = tl.load(straddle_counts + row) > 0

    pair = tl.arange(0, BLOCK_PAIRS)
    in_pairs = pair < PAIRS
    x_dim = pair * 2 if INTERLEAVED else pair
    y_dim = x_dim + (1 if INTERLEAVED else PAIRS)
    x = _mean_over_heads(query, token, valid, x_dim, in_pairs, head_weight, stride_t, stride_n,
                         HEADS)  # fmt: skip
    y = _mean_over_heads(query, token, valid, y_dim, in_pairs, head_weight, stride_t, stride_n,
                         HEADS)  # fmt: skip
    if inv_freq is not None:
        frequency = tl.load(inv_freq + pair, mask=in_pairs, other=0.0)
        angle = position.to(tl.float32)[:, None] * frequency[None, :]
        cos = tl.cos(angle) * turn_scale
        sin = tl.sin(angle) * turn_scale
    else:
        entry = position.to(tl.int64)[:, None] * PAIRS + pair[None, :]
        known = valid[:, None] & in_pairs[None, :]
        cos = tl.load(cos_table + entry, mask=known, other=0.0)
        sin = tl.load(sin_table + entry, mask=known, other=0.0)
    turned_x = x * cos + y * sin
    turned_y = y * cos - x * sin
    old_x = _old_sum(sums, slot, straddled, row, continues, has_sum, x_dim, in_pairs, HEAD_DIM)
    old_y = _old_sum(sums, slot, straddled, row, continues, has_sum, y_dim, in_pairs, HEAD_DIM)
    _add_sum(sums, slot, x_dim, in_pairs, turned_x, old_x, HEAD_DIM)
    _add_sum(sums, slot, y_dim, in_pairs, turned_y, old_y, HEAD_DIM)
    if routed:
        _add_parts(parts, row, granule, position, end, x_dim, in_pairs, turned_x, valid,
                   POOL_TOKENS, SLOTS, HEAD_DIM)  # fmt: skip
        _add_parts(parts, row, granule, position, end, y_dim, in_pairs, turned_y, valid,
                   POOL_TOKENS, SLOTS, HEAD_DIM)  # fmt: skip
    if HEAD_DIM > 2 * PAIRS:
        z_dim = 2 * PAIRS + tl.arange(0, BLOCK_REST)
        in_rest = z_dim < HEAD_DIM
        z = _mean_over_heads(query, token, valid, z_dim, in_rest, head_weight, stride_t, stride_n,
                             HEADS)  # fmt: skip
        old_z = _old_sum(sums, slot, straddled, row, continues, has_sum, z_dim, in_rest, HEAD_DIM)
        _add_sum(sums, slot, z_dim, in_rest, z, old_z, HEAD_DIM)
        if routed:
            _add_parts(parts, row, granule, position, end, z_dim, in_rest, z, valid,
                       POOL_TOKENS, SLOTS, HEAD_DIM)  # fmt: skip


@triton.jit
def _pool_kernel(
    sums,
    counts,
    block_table,
    rows,
    straddle_counts,
    pooled_tokens,
    parts,
    straddled,
    pooled,
    stride_table,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GRANULES_PER_BLOCK: tl.constexpr,
    POOL_TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(rows + row * 8 + 4) == 0:
        return
    computed = tl.load(rows + row * 8 + 1)
    end = computed + tl.load(rows + row * 8 + 2)
    table = block_table + tl.load(rows + row * 8 + 3).to(tl.int64) * stride_table
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    total = tl.zeros([BLOCK_D], tl.float32)
    for which in tl.static_range(2):
        begin, stop = pooled_range(end, which, POOL_TOKENS)
        slot = tl.arange(0, SLOTS)
        granule = begin // _GRANULE + slot
        earlier = tl.minimum(stop, computed)
        whole = (granule < computed // _GRANULE) & (granule * _GRANULE < earlier)
        physical = physical_granule(table, granule, whole, GRANULES_PER_BLOCK)
        whole &= tl.load(counts + physical, mask=whole, other=0) > 0
        source = sums + physical[:, None] * HEAD_DIM + d[None, :]
        old = tl.load(source, mask=whole[:, None] & in_head[None, :], other=0.0)
        total += tl.sum(old.to(tl.float32), axis=0)
        first = tl.maximum(tl.maximum(begin, computed), granule * _GRANULE)
        now = first < tl.minimum(stop, granule * _GRANULE + _GRANULE)
        source = parts + ((row * 2 + which) * SLOTS + slot)[:, None] * HEAD_DIM + d[None, :]
        new = tl.load(source, mask=now[:, None] & in_head[None, :], other=0.0)
        total += tl.sum(new, axis=0)
        if (earlier > begin) & (earlier > computed // _GRANULE * _GRANULE):
            total += tl.load(straddled + row * HEAD_DIM + d, mask=in_head, other=0.0)
    total = total / tl.load(pooled_tokens + row)
    tl.store(pooled + row * HEAD_DIM + d, total, mask=in_head)
