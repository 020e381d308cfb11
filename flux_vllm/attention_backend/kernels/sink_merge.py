"""Add the sinks to attention over the window alone: the second half of sparse prefill with FA3.

A query at position p has its window (p - W, p] in `out` and `lse`; this adds keys
[0, min(S, p - W + 1)), the sinks that the window does not already hold, and joins the two by their
log-sum-exp. Queries that have no such key are left as they are. Where heads have learned sinks
(scores without a value), they are added to every query.

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
    dot,
    find_row,
    power_of_two,
    softmax_step,
)


class MergeTile(NamedTuple):
    """How one program is sized. The sinks are few: it is the queries' traffic that counts."""

    block_m: int
    """Rows of a tile: queries times the query heads of a kv head."""
    block_n: int
    """Keys taken at a time; all sinks, if they fit, are then loaded once."""
    num_tiles: int
    """Tiles of queries that a program takes in turn."""
    num_warps: int
    num_stages: int


MANY_TOKENS = 4096
"""From so many tokens of a batch on its tile is another: one kernel more."""


def default_tile(head_dim: int, sink_tokens: int, num_tokens: int) -> MergeTile:
    """Choose a tile for a model's shape and a batch's tokens; measured on Hopper."""
    if INTERPRETED:
        return MergeTile(64, 32, 2, 4, 1)
    most = 128 if head_dim <= 128 else 64
    block_n = min(most, max(16, power_of_two(sink_tokens)))
    return MergeTile(64, block_n, 8 if num_tokens >= MANY_TOKENS else 4, 4, 2)


def merge_sinks(
    query: torch.Tensor,
    cache: KVCache,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: PagedRows,
    *,
    scale: float,
    sink_tokens: int,
    window_tokens: int,
    sink_logits: torch.Tensor | None = None,
    tile: MergeTile | None = None,
) -> None:
    """Merge the sinks into the output of rows whose `seqused_q` is not 0.

    Args:
        query: [T, N, H] float16 or bfloat16, last dimension contiguous.
        cache: of the same dtype, or of float8.
        out: [T, N, H], in and out: attention over the window.
        lse: [N, T] float32, its log-sum-exp (natural logarithm), without learned sinks.
        rows: of the batch, with `seqused_q`; table entries past the sinks are never read.
        scale: softmax scale.
        sink_tokens: S.
        window_tokens: W, the query's own key included.
        sink_logits: [N] of the heads' learned sinks; None for heads without.
        tile: sizes; None for the default.

    Host sync: none. CUDA graph: safe; allocates nothing.
    """
    tokens, heads, head_dim = query.shape
    num_rows, kv_heads = rows.seqused_k.shape[0], cache.keys.shape[2]
    group = heads // kv_heads
    assert query.stride(2) == out.stride(2) == cache.keys.stride(3) == cache.values.stride(3) == 1
    assert lse.shape == (heads, tokens), f"lse {tuple(lse.shape)}, expected {(heads, tokens)}"
    assert rows.seqused_q is not None
    if tokens == 0 or num_rows == 0 or (sink_tokens == 0 and sink_logits is None):
        return
    tile = tile or default_tile(head_dim, sink_tokens, tokens)
    block_q = tile.block_m // group
    grid = (tokens // (block_q * tile.num_tiles) + num_rows, kv_heads)
    _sink_kernel[grid](
        query,
        cache.keys,
        cache.values,
        out,
        lse,
        *rows,
        sink_logits,
        num_rows,
        scale * cache.key_scale * LOG2_E,
        cache.value_scale,
        *query.stride()[:2],
        *cache.keys.stride()[:3],
        *cache.values.stride()[:3],
        *out.stride()[:2],
        lse.stride(0),
        rows.block_table.stride(0),
        LOG2_E=LOG2_E,
        FIRST_POSITION=window_tokens if sink_logits is None else 0,
        SINK_TOKENS=sink_tokens,
        WINDOW_TOKENS=window_tokens,
        BLOCK_SIZE=cache.keys.shape[1],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        BLOCK_Q=block_q,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        TILES=tile.num_tiles,
        INTERPRET=INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit
def _load_sinks(
    key_base, value_base, table, n, keys, d, stride_kb, stride_kt, stride_vb, stride_vt,
    SINK_TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Load a tile of the sinks' keys and values; rows may have fewer keys than sinks."""
    in_use = n < tl.minimum(keys, SINK_TOKENS)
    loaded = in_use[:, None] & (d < HEAD_DIM)[None, :]
    block = tl.load(table + n // BLOCK_SIZE, mask=in_use, other=0).to(tl.int64)
    k_offset = block * stride_kb + (n % BLOCK_SIZE) * stride_kt
    v_offset = block * stride_vb + (n % BLOCK_SIZE) * stride_vt
    k = tl.load(key_base + k_offset[:, None] + d[None, :], mask=loaded, other=0.0)
    v = tl.load(value_base + v_offset[:, None] + d[None, :], mask=loaded, other=0.0)
    return k, v


@triton.jit
def _absorb(
    q, k, v, n, position, largest, total, acc, scale_log2,
    SINK_TOKENS: tl.constexpr, WINDOW_TOKENS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Take a tile of sinks into the running softmax, but those within a query's window."""
    scores = dot(q, tl.trans(k.to(q.dtype)), None, INTERPRET) * scale_log2
    outside = n[None, :] <= (position - WINDOW_TOKENS)[:, None]
    scores = tl.where((n < SINK_TOKENS)[None, :] & outside, scores, float("-inf"))
    weights, largest, total, acc = softmax_step(scores, largest, total, acc)
    return largest, total, dot(weights.to(q.dtype), v.to(q.dtype), acc, INTERPRET)


@triton.jit(do_not_specialize=["num_rows", "stride_lse"])
def _sink_kernel(
    query,
    key_cache,
    value_cache,
    out,
    lse,
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
    stride_lse,
    stride_table,
    LOG2_E: tl.constexpr,
    FIRST_POSITION: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    WINDOW_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, q_tile = find_row(query_start_loc, tl.program_id(0), num_rows, BLOCK_Q * TILES)
    queries = tl.load(seqused_q + row)
    keys = tl.load(seqused_k + row)
    first_query = q_tile * BLOCK_Q * TILES
    stop_query = tl.minimum(first_query + BLOCK_Q * TILES, queries)
    context = keys - queries
    if (q_tile < 0) | (first_query >= queries) | (context + stop_query <= FIRST_POSITION):
        return
    kv_head = tl.program_id(1)
    table_row = row
    if kv_batch_idx is not None:
        table_row = tl.load(kv_batch_idx + row)
    table = block_table + table_row.to(tl.int64) * stride_table
    key_base = key_cache + kv_head * stride_kh
    value_base = value_cache + kv_head * stride_vh
    start_token = tl.load(query_start_loc + row)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + m % GROUP
    if SINK_TOKENS <= BLOCK_N:
        k, v = _load_sinks(key_base, value_base, table, n, keys, d, stride_kb, stride_kt, stride_vb,
                           stride_vt, SINK_TOKENS, BLOCK_SIZE, HEAD_DIM)  # fmt: skip
    for tile_query in range(first_query, stop_query, BLOCK_Q):
        index = tile_query + m // GROUP
        position = context + index
        token = (start_token + index).to(tl.int64)
        # Queries that nothing is added to keep their output bit by bit.
        valid = (position >= FIRST_POSITION) & (index < stop_query) & (m < BLOCK_Q * GROUP)
        stored = valid[:, None] & (d < HEAD_DIM)[None, :]
        q_pointers = query + (token * stride_qt + head * stride_qn)[:, None] + d[None, :]
        o_pointers = out + (token * stride_ot + head * stride_on)[:, None] + d[None, :]
        q = tl.load(q_pointers, mask=stored, other=0.0)
        # The window is the first share of the softmax: its sum is 1 at a maximum of its lse.
        acc = tl.load(o_pointers, mask=stored, other=0.0).to(tl.float32) / value_scale
        largest = tl.load(lse + head * stride_lse + token, mask=valid, other=0.0) * LOG2_E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        if sink_logits is not None:
            logit = tl.load(sink_logits + head).to(tl.float32) * LOG2_E
            _, largest, total, acc = softmax_step(logit[:, None], largest, total, acc)
        if SINK_TOKENS <= BLOCK_N:
            largest, total, acc = _absorb(q, k, v, n, position, largest, total, acc, scale_log2,
                                          SINK_TOKENS, WINDOW_TOKENS, INTERPRET)  # fmt: skip
        else:
            for start in range(0, SINK_TOKENS, BLOCK_N):
                k, v = _load_sinks(key_base, value_base, table, start + n, keys, d, stride_kb,
                                   stride_kt, stride_vb, stride_vt, SINK_TOKENS, BLOCK_SIZE,
                                   HEAD_DIM)  # fmt: skip
                largest, total, acc = _absorb(
                    q, k, v, start + n, position, largest, total, acc, scale_log2, SINK_TOKENS,
                    WINDOW_TOKENS, INTERPRET,
                )  # fmt: skip
        attended = acc / total[:, None] * value_scale
        tl.store(o_pointers, attended.to(out.dtype.element_ty), mask=stored)
