"""Prefill attention over the paged cache in Triton: FULL, or exact sinks and window in one pass.

A tile of queries packs the query heads that share a kv head. Under SPARSE it visits the tiles of
the sinks, then those of its window; every key counts once, also where the two overlap.

Dimension legend: T packed tokens, N query heads, H head dim.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows
from flux_vllm.attention_backend.kernels.tiles import (
    INTERPRETED,
    LOG2_E,
    begin_softmax,
    dot,
    find_row,
    is_hopper,
    power_of_two,
    softmax_step,
)

SUPPORTED_HEAD_DIMS = (64, 96, 128, 256)
MANY_TOKENS = 1024
"""From so many tokens of a batch on its tile is another: one kernel more."""


class PrefillTile(NamedTuple):
    """How one program is sized."""

    block_m: int
    """Rows of the tile: queries times the query heads of a kv head."""
    block_n: int
    """Keys taken at a time."""
    num_warps: int
    num_stages: int


def default_tile(
    head_dim: int, element_size: int, queries_per_kv: int, num_tokens: int
) -> PrefillTile:
    """Choose a tile for a model's shape and a batch's tokens; measured on Hopper.

    Elsewhere it is small enough for the shared memory of Ada, 99 KiB.
    """
    if INTERPRETED:
        return PrefillTile(64, 32, 4, 1)
    if element_size == 4:
        return PrefillTile(max(32, power_of_two(queries_per_kv)), 32, 4, 1)
    if head_dim > 128:
        return PrefillTile(64, 32, 4, 1)
    if not is_hopper():
        return PrefillTile(64, 64, 4, 2)
    if num_tokens >= MANY_TOKENS:
        return PrefillTile(256, 64, 16, 2)
    return PrefillTile(64, 64, 4, 3)


def attend_prefill(
    query: torch.Tensor,
    cache: KVCache,
    out: torch.Tensor,
    rows: PagedRows,
    *,
    scale: float,
    sparse: bool,
    sink_tokens: int = 0,
    window_tokens: int = 0,
    sink_logits: torch.Tensor | None = None,
    tile: PrefillTile | None = None,
) -> None:
    """Attend the rows whose `seqused_q` is not 0; the output of others stays as it is.

    Args:
        query: [T, N, H] float32, float16 or bfloat16, last dimension contiguous.
        cache: of the same dtype, or of float8.
        out: [T, N, H], written for attended rows only.
        rows: of the batch, with `seqused_q`.
        scale: softmax scale.
        sparse: attend to sinks and window instead of every earlier key.
        sink_tokens: first tokens attended.
        window_tokens: latest tokens attended, the query's own included; at least 1 if sparse.
        sink_logits: [N] of the heads' learned sinks; None for heads without.
        tile: sizes; None for the default.

    Host sync: none. CUDA graph: safe; allocates nothing.
    """
    tokens, heads, head_dim = query.shape
    num_rows, kv_heads = rows.seqused_k.shape[0], cache.keys.shape[2]
    group = heads // kv_heads
    assert head_dim in SUPPORTED_HEAD_DIMS, f"head_dim {head_dim}, one of {SUPPORTED_HEAD_DIMS}"
    assert not sparse or window_tokens >= 1, f"window_tokens {window_tokens}, at least 1"
    assert query.stride(2) == out.stride(2) == cache.keys.stride(3) == cache.values.stride(3) == 1
    assert rows.seqused_q is not None
    if tokens == 0 or num_rows == 0:
        return
    tile = tile or default_tile(head_dim, query.element_size(), group, tokens)
    block_q = tile.block_m // group
    grid = (tokens // block_q + num_rows, kv_heads)
    _prefill_kernel[grid](
        query,
        cache.keys,
        cache.values,
        out,
        *rows,
        sink_logits,
        num_rows,
        scale * cache.key_scale * LOG2_E,
        cache.value_scale,
        *query.stride()[:2],
        *cache.keys.stride()[:3],
        *cache.values.stride()[:3],
        *out.stride()[:2],
        rows.block_table.stride(0),
        SPARSE=sparse,
        SINK_TOKENS=sink_tokens,
        WINDOW_TOKENS=window_tokens,
        BLOCK_SIZE=cache.keys.shape[1],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        BLOCK_Q=block_q,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        INTERPRET=INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit
def _first_tiles(low, SPARSE: tl.constexpr, SINK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return how many sink tiles precede the window, and where the window's tiles begin."""
    sink_tiles = 0
    begin = 0
    if SPARSE:
        sinks: tl.constexpr = (SINK_TOKENS + BLOCK_N - 1) // BLOCK_N
        begin = tl.maximum(low, 0) // BLOCK_N * BLOCK_N
        sink_tiles = tl.minimum(begin // BLOCK_N, sinks)
    return sink_tiles, begin


@triton.jit(do_not_specialize=["num_rows"])
def _prefill_kernel(
    query,
    key_cache,
    value_cache,
    out,
    block_table,
    kv_batch_idx,
    query_start_loc,
    seqused_k,
    seqused_q,
    sink_logits,
    num_rows,
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
    SPARSE: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    WINDOW_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # Late tiles have the most keys under FULL: begin with them.
    row, q_tile = find_row(
        query_start_loc, tl.num_programs(0) - 1 - tl.program_id(0), num_rows, BLOCK_Q
    )
    queries = tl.load(seqused_q + row)
    first_query = q_tile * BLOCK_Q
    if (q_tile < 0) | (first_query >= queries):
        return
    kv_head = tl.program_id(1)
    keys = tl.load(seqused_k + row)
    first = keys - queries + first_query  # position of the tile's first query
    last = tl.minimum(first + BLOCK_Q, keys) - 1
    table_row = row
    if kv_batch_idx is not None:
        table_row = tl.load(kv_batch_idx + row)
    table = block_table + table_row.to(tl.int64) * stride_table

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    position = first + m // GROUP
    token = (tl.load(query_start_loc + row) + first_query + m // GROUP).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    stored = ((position <= last) & (m < BLOCK_Q * GROUP))[:, None] & (d < HEAD_DIM)[None, :]
    q_pointers = query + (token * stride_qt + head * stride_qn)[:, None] + d[None, :]
    q = tl.load(q_pointers, mask=stored, other=0.0)
    key_base = key_cache + kv_head * stride_kh
    value_base = value_cache + kv_head * stride_vh

    largest, total = begin_softmax(sink_logits, head, True, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sink_tiles, begin = _first_tiles(first - WINDOW_TOKENS + 1, SPARSE, SINK_TOKENS, BLOCK_N)
    tiles = sink_tiles + (last + BLOCK_N - begin) // BLOCK_N
    for i in range(0, tiles):
        start = i * BLOCK_N
        if SPARSE:
            start += tl.where(i < sink_tiles, 0, begin - sink_tiles * BLOCK_N)
        n = start + tl.arange(0, BLOCK_N)
        in_use = n < keys
        if SPARSE:
            # Between sinks and window blocks may be given back: a tile is loaded up to them only.
            in_use &= (n < SINK_TOKENS) | (n > first - WINDOW_TOKENS)
        loaded = in_use[:, None] & (d < HEAD_DIM)[None, :]
        block = tl.load(table + n // BLOCK_SIZE, mask=in_use, other=0).to(tl.int64)
        k_offset = block * stride_kb + (n % BLOCK_SIZE) * stride_kt
        k = tl.load(key_base + k_offset[:, None] + d[None, :], mask=loaded, other=0.0)
        scores = dot(q, tl.trans(k.to(q.dtype)), None, INTERPRET) * scale_log2
        edge = start + BLOCK_N > first + 1
        if SPARSE:
            edge |= (start <= last - WINDOW_TOKENS) & (start + BLOCK_N > SINK_TOKENS)
        if edge:
            visible = n[None, :] <= position[:, None]
            if SPARSE:
                near = n[None, :] > position[:, None] - WINDOW_TOKENS
                visible &= near | (n < SINK_TOKENS)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        weights, largest, total, acc = softmax_step(scores, largest, total, acc)
        v_offset = block * stride_vb + (n % BLOCK_SIZE) * stride_vt
        v = tl.load(value_base + v_offset[:, None] + d[None, :], mask=loaded, other=0.0)
        acc = dot(weights.to(q.dtype), v.to(q.dtype), acc, INTERPRET)

    o_pointers = out + (token * stride_ot + head * stride_on)[:, None] + d[None, :]
    attended = acc / total[:, None] * value_scale
    tl.store(o_pointers, attended.to(out.dtype.element_ty), mask=stored)
