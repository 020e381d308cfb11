"""Attention of query blocks over lists of key blocks in the paged cache, a list a head.

Dimension legend: R rows, T packed tokens, N query heads, K kv heads, H head dim, B KV blocks,
M table width, Q tasks, E entries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.block_lists import BlockLists
from flux_vllm.attention_backend.kernels.block_tasks import BLOCK_TOKENS
from flux_vllm.attention_backend.kernels.paged import KVCache
from flux_vllm.attention_backend.kernels.tiles import (
    INTERPRETED,
    LOG2_E,
    begin_softmax,
    dot,
    is_hopper,
    power_of_two,
    softmax_step,
)

_BLOCK = tl.constexpr(BLOCK_TOKENS)


class SparseTile(NamedTuple):
    """How one program, a query block of one head, is sized."""

    block_n: int
    """Keys taken at a time; divides 128."""
    num_warps: int
    num_stages: int


def default_tile(head_dim: int) -> SparseTile:
    """Choose a tile that fits the shared memory of Hopper, or elsewhere that of Ada, 99 KiB."""
    if INTERPRETED:
        return SparseTile(64, 4, 1)
    if is_hopper():
        return SparseTile(64, 8, 3 if head_dim <= 128 else 2)
    return SparseTile(64, 8, 2) if head_dim <= 128 else SparseTile(16, 8, 1)


def attend_blocks(
    query: torch.Tensor,
    cache: KVCache,
    out: torch.Tensor,
    lists: BlockLists,
    *,
    scale: float,
    sink_logits: torch.Tensor | None = None,
    tile: SparseTile | None = None,
) -> None:
    """Attend the rows whose `seqused_q` is not 0; the output of others stays as it is.

    Args:
        query: [T, N, H] float16 or bfloat16, last dimension contiguous.
        cache: of the same dtype, or of float8.
        out: [T, N, H], written for attended rows only.
        lists: of the layer; within a task's own block a query sees keys up to itself.
        scale: softmax scale.
        sink_logits: [N] of the heads' learned sinks; None for heads without.
        tile: sizes; None for the default.

    Host sync: none; allocates nothing.
    """
    heads, head_dim = query.shape[1:]
    assert query.stride(2) == out.stride(2) == cache.keys.stride(3) == cache.values.stride(3) == 1
    tile = tile or default_tile(head_dim)
    _sparse_kernel[(len(lists.tasks), heads)](
        query,
        cache.keys,
        cache.values,
        out,
        *lists,
        sink_logits,
        scale * cache.key_scale * LOG2_E,
        cache.value_scale,
        *query.stride()[:2],
        *cache.keys.stride()[:3],
        *cache.values.stride()[:3],
        *out.stride()[:2],
        lists.block_table.stride(0),
        lists.chosen.stride(0),
        lists.counts.stride(0),
        BLOCK_SIZE=cache.keys.shape[1],
        GROUP=heads // cache.keys.shape[2],
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        BLOCK_N=tile.block_n,
        TILES=BLOCK_TOKENS // tile.block_n,
        INTERPRET=INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit(do_not_specialize=["stride_chosen", "stride_counts"])
def _sparse_kernel(
    query,
    key_cache,
    value_cache,
    out,
    block_table,
    query_start_loc,
    seqused_q,
    seqused_k,
    tasks,
    chosen,
    counts,
    sink_logits,
    scale_log2,
    value_scale,
    stride_qt,
    stride_qn,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_on,
    stride_table,
    stride_chosen,
    stride_counts,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # Late blocks have the most keys: begin with them.
    task = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.load(tasks + task * 3)
    if row < 0:
        return
    queries = tl.load(seqused_q + row)
    if queries == 0:
        return
    block = tl.load(tasks + task * 3 + 1)
    head = tl.program_id(1)
    keys = tl.load(seqused_k + row)
    position = block * _BLOCK + tl.arange(0, _BLOCK)
    d = tl.arange(0, BLOCK_D)
    present = (position >= keys - queries) & (position < keys)
    stored = present[:, None] & (d < HEAD_DIM)[None, :]
    token = (tl.load(query_start_loc + row) + position - (keys - queries)).to(tl.int64)
    q_pointers = query + (token * stride_qt + head * stride_qn)[:, None] + d[None, :]
    q = tl.load(q_pointers, mask=stored, other=0.0)
    table = block_table + row.to(tl.int64) * stride_table
    key_base = key_cache + head // GROUP * stride_kh
    value_base = value_cache + head // GROUP * stride_vh
    listed = chosen + head.to(tl.int64) * stride_chosen + tl.load(tasks + task * 3 + 2)

    of_query = head + tl.zeros([_BLOCK], tl.int32)
    largest, total = begin_softmax(sink_logits, of_query, True, _BLOCK)
    acc = tl.zeros([_BLOCK, BLOCK_D], tl.float32)
    for i in range(0, tl.load(counts + head * stride_counts + task) * TILES):
        key_block = tl.load(listed + i // TILES)
        n = key_block * _BLOCK + i % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        loaded = (n < keys)[:, None] & (d < HEAD_DIM)[None, :]
        page = tl.load(table + n // BLOCK_SIZE, mask=n < keys, other=0).to(tl.int64)
        k_offset = page * stride_kb + (n % BLOCK_SIZE) * stride_kt
        k = tl.load(key_base + k_offset[:, None] + d[None, :], mask=loaded, other=0.0)
        scores = dot(q, tl.trans(k.to(q.dtype)), None, INTERPRET) * scale_log2
        if key_block == block:
            scores = tl.where(n[None, :] <= position[:, None], scores, float("-inf"))
        weights, largest, total, acc = softmax_step(scores, largest, total, acc)
        v_offset = page * stride_vb + (n % BLOCK_SIZE) * stride_vt
        v = tl.load(value_base + v_offset[:, None] + d[None, :], mask=loaded, other=0.0)
        acc = dot(weights.to(q.dtype), v.to(q.dtype), acc, INTERPRET)

    o_pointers = out + (token * stride_ot + head * stride_on)[:, None] + d[None, :]
    attended = acc / total[:, None] * value_scale
    tl.store(o_pointers, attended.to(out.dtype.element_ty), mask=stored)
