"""Query sums on the GPU: this step's queries, averaged over heads and rotated back.

They are added to the sums of their granules; what the routed rows pool of them is noted apart,
because tokens of the step count exactly. `flux_vllm.router.state` does the same on the CPU.

Dimension legend: L layers, P prompt rows, T packed tokens, N query heads, H head dim, G granules of
the KV cache.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.pooling import PoolingWorkspace
from flux_vllm.attention_backend.kernels.prompt_rows import (
    PackedRows,
    PromptRowBuffers,
    find_granule,
    pooled_range,
)
from flux_vllm.attention_backend.kernels.tiles import power_of_two
from flux_vllm.attention_backend.kernels.trigonometry import cos_sin
from flux_vllm.router.features import GRANULE_TOKENS

_GRANULE = tl.constexpr(GRANULE_TOKENS)
_PAIRS_AT_ONCE = 64
"""Rotated pairs a program takes: 128 bytes of a head are read together."""
_HEADS_AT_ONCE = 16
"""Most loads in flight: a program's time is memory latency, not arithmetic."""


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


def update_sums(
    query: torch.Tensor,
    sums: torch.Tensor,
    slot_mapping: torch.Tensor,
    step: PromptRowBuffers,
    workspace: PoolingWorkspace,
    rotary: InverseRotary,
    packed: PackedRows,
    *,
    pool_tokens: int,
) -> None:
    """Add this step's prompt queries to the sums of some layers, and note what is pooled of them.

    Args:
        query: [L, >= T, N, H] after RoPE, any float type, last dimension contiguous; N is 1 for
            queries that were averaged over heads before, which a rotation does not mind.
        sums: [L, G, H] bfloat16, in and out.
        slot_mapping: [>= T] int64.
        step: after `update_counts`.
        workspace: what layer l's prompt row p adds goes to entry l * P + p.
        rotary: of these layers.
        packed: of the step.
        pool_tokens: tokens pooled at an end of a prompt.

    Host sync: none; allocates nothing.
    """
    num_rows = len(packed.rows)
    if num_rows == 0:
        return
    layers, _, heads, head_dim = query.shape
    assert sums.is_contiguous()
    assert workspace.straddled.shape[0] >= layers * num_rows, "workspace too small"
    pairs = rotary.rotary_dim // 2
    block_pairs = min(_PAIRS_AT_ONCE, power_of_two(pairs))
    pair_parts = -(-pairs // block_pairs)
    rest_parts = -(-(head_dim - 2 * pairs) // block_pairs)
    _write_kernel[(packed.num_programs, pair_parts + rest_parts, layers)](
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
        *query.stride()[:3],
        sums.stride(0),
        HEADS=heads,
        AT_ONCE=_heads_at_once(heads),
        HEAD_DIM=head_dim,
        PAIRS=pairs,
        BLOCK_PAIRS=block_pairs,
        PAIR_PARTS=pair_parts,
        INTERLEAVED=rotary.interleaved,
        POOL_TOKENS=pool_tokens,
        ENDS=workspace.parts.shape[1],
        SLOTS=workspace.parts.shape[2],
        num_warps=max(1, block_pairs // 16),  # 16 bytes a thread and load
    )


@functools.cache
def _heads_at_once(heads: int) -> int:
    return max(n for n in range(1, _HEADS_AT_ONCE + 1) if heads % n == 0)


@triton.jit
def _mean_over_heads(
    query, token, valid, dim, dim_valid, weight, stride_t, stride_n,
    HEADS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Average some dimensions of 16 tokens' queries over heads: [16, dims] float32."""
    loaded = valid[:, None] & dim_valid[None, :]
    pointers = query + (token * stride_t)[:, None] + dim[None, :]
    total = tl.zeros([_GRANULE, dim.shape[0]], tl.float32)
    for begin in range(0, HEADS, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            some = tl.load(pointers + (begin + i) * stride_n, mask=loaded, other=0.0)
            total += some.to(tl.float32)
    return total * weight


@triton.jit
def _add_parts(
    parts, entry, granule, position, end, dim, dim_valid, x, valid,
    POOL_TOKENS: tl.constexpr, ENDS: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Note what the ends of the prompt pool of this granule's queries in this step."""
    for which in tl.static_range(ENDS):
        begin, stop = pooled_range(end, which, POOL_TOKENS)
        counted = valid & (position >= begin) & (position < stop)
        slot = granule - begin // _GRANULE
        if tl.max(counted.to(tl.int32), axis=0) > 0:
            part = tl.sum(tl.where(counted[:, None], x, 0.0), axis=0)
            target = parts + ((entry * ENDS + which) * SLOTS + slot).to(tl.int64) * HEAD_DIM + dim
            tl.store(target, part, mask=dim_valid)


@triton.jit
def _keep(
    sums, slot, straddled, parts, entry, granule, position, end, valid, continues, has_sum, routed,
    dim, dim_valid, x,
    POOL_TOKENS: tl.constexpr, ENDS: tl.constexpr, SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Add some dimensions of this step's queries to their granule's sum, and note the parts."""
    old = tl.zeros([dim.shape[0]], tl.float32)
    target = sums + slot // _GRANULE * HEAD_DIM + dim
    if continues:
        if has_sum & (slot >= 0):
            old = tl.load(target, mask=dim_valid, other=0.0).to(tl.float32)
        tl.store(straddled + entry * HEAD_DIM + dim, old, mask=dim_valid)
    if slot >= 0:
        tl.store(target, (old + tl.sum(x, axis=0)).to(sums.dtype.element_ty), mask=dim_valid)
    if routed:
        _add_parts(parts, entry, granule, position, end, dim, dim_valid, x, valid,
                   POOL_TOKENS, ENDS, SLOTS, HEAD_DIM)  # fmt: skip


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
    stride_layer,
    stride_t,
    stride_n,
    stride_sums,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PAIR_PARTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    POOL_TOKENS: tl.constexpr,
    ENDS: tl.constexpr,
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
    layer = tl.program_id(2)
    entry = layer * num_rows + row
    query += layer.to(tl.int64) * stride_layer
    sums += layer.to(tl.int64) * stride_sums

    lane = tl.arange(0, BLOCK_PAIRS)
    if tl.program_id(1) >= PAIR_PARTS:  # dimensions that are not rotated
        z_dim = 2 * PAIRS + (tl.program_id(1) - PAIR_PARTS) * BLOCK_PAIRS + lane
        in_rest = z_dim < HEAD_DIM
        z = _mean_over_heads(query, token, valid, z_dim, in_rest, head_weight, stride_t, stride_n,
                             HEADS, AT_ONCE)  # fmt: skip
        _keep(sums, slot, straddled, parts, entry, granule, position, end, valid, continues,
              has_sum, routed, z_dim, in_rest, z, POOL_TOKENS, ENDS, SLOTS, HEAD_DIM)  # fmt: skip
        return
    pair = tl.program_id(1) * BLOCK_PAIRS + lane
    in_pairs = pair < PAIRS
    x_dim = pair * 2 if INTERLEAVED else pair
    y_dim = x_dim + (1 if INTERLEAVED else PAIRS)
    x = _mean_over_heads(query, token, valid, x_dim, in_pairs, head_weight, stride_t, stride_n,
                         HEADS, AT_ONCE)  # fmt: skip
    y = _mean_over_heads(query, token, valid, y_dim, in_pairs, head_weight, stride_t, stride_n,
                         HEADS, AT_ONCE)  # fmt: skip
    if inv_freq is not None:
        frequency = tl.load(inv_freq + pair, mask=in_pairs, other=0.0)
        cos, sin = cos_sin(position.to(tl.float32)[:, None] * frequency[None, :])
        cos *= turn_scale
        sin *= turn_scale
    else:
        turn = position.to(tl.int64)[:, None] * PAIRS + pair[None, :]
        known = valid[:, None] & in_pairs[None, :]
        cos = tl.load(cos_table + turn, mask=known, other=0.0)
        sin = tl.load(sin_table + turn, mask=known, other=0.0)
    _keep(sums, slot, straddled, parts, entry, granule, position, end, valid, continues, has_sum,
          routed, x_dim, in_pairs, x * cos + y * sin, POOL_TOKENS, ENDS, SLOTS,
          HEAD_DIM)  # fmt: skip
    _keep(sums, slot, straddled, parts, entry, granule, position, end, valid, continues, has_sum,
          routed, y_dim, in_pairs, y * cos - x * sin, POOL_TOKENS, ENDS, SLOTS,
          HEAD_DIM)  # fmt: skip
