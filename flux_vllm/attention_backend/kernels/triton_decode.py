"""Decode attention in Triton for mixed routes: one call reads real or compacted table rows.

Split over the keys (flash-decoding): each program takes a share of a row's keys, a second kernel
joins the shares. A row may have a few queries (speculative decoding), causal among themselves.

Dimension legend: T packed tokens, N query heads, H head dim, P splits.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows
from flux_vllm.attention_backend.kernels.tiles import (
    INTERPRETED,
    LOG2_E,
    NO_SCORE,
    begin_softmax,
    dot,
    power_of_two,
    softmax_step,
)

QUERIES = 8
"""So many queries a row does a workspace for rows hold at full split; rows of more get fewer."""


class DecodeWorkspace(NamedTuple):
    """Where shares meet; one serves every layer and step, each from its beginning."""

    out: torch.Tensor
    """[tokens * N * P * H] float32, of the largest batch."""
    lse: torch.Tensor
    """[tokens * N * P] float32, base 2."""
    num_splits: int
    """P of this batch. With one the workspace is not touched, and may be empty."""

    def fit(self, num_splits: int, tokens: int, heads: int, head_dim: int) -> "DecodeWorkspace":
        """Return the workspace for `num_splits`, halved until a batch's shares fit in it."""
        vectors = min(self.lse.numel(), self.out.numel() // head_dim)
        return self._replace(num_splits=fitting_splits(num_splits, tokens, vectors // heads))


def fitting_splits(num_splits: int, tokens: int, shares: int) -> int:
    """Halve `num_splits` until the shares of all tokens are no more than `shares`."""
    while num_splits > 1 and tokens * num_splits > shares:
        num_splits //= 2
    return num_splits


def decode_workspace(
    max_tokens: int, heads: int, head_dim: int, num_splits: int, device: torch.device
) -> DecodeWorkspace:
    """Allocate a workspace for up to `max_tokens` queries in `num_splits` shares."""
    vectors = max_tokens * heads * num_splits
    return DecodeWorkspace(
        torch.empty(vectors * head_dim, device=device),
        torch.empty(vectors, device=device),
        num_splits,
    )


def choose_num_splits(rows: int, kv_heads: int, num_sms: int, most: int = 64) -> int:
    """Choose the shares a row is split in at most, from sizes that a CUDA graph fixes."""
    wanted = -(-4 * num_sms // max(1, rows * kv_heads))
    return min(most, power_of_two(max(1, wanted)))


@functools.cache
def most_shares(max_rows: int, kv_heads: int, num_sms: int) -> int:
    """Return the most shares, over all rows, of a batch of up to `max_rows`; 0 if none is split."""
    splits = {rows: choose_num_splits(rows, kv_heads, num_sms) for rows in range(1, max_rows + 1)}
    return max((rows * count for rows, count in splits.items() if count > 1), default=0)


def query_tile(max_query_len: int, group: int) -> int:
    """Return the rows of a tile: queries times the query heads of a kv head."""
    return max(16, power_of_two(max_query_len * group))


def default_block_n(head_dim: int, element_size: int) -> int:
    """Choose how many keys are taken at a time; measured on Hopper."""
    return 32 if INTERPRETED or element_size == 4 or head_dim > 128 else 128


def attend_decode(
    query: torch.Tensor,
    cache: KVCache,
    out: torch.Tensor,
    rows: PagedRows,
    workspace: DecodeWorkspace,
    *,
    max_query_len: int,
    scale: float,
    sink_logits: torch.Tensor | None = None,
    block_n: int | None = None,
) -> None:
    """Attend decode rows, each over the table row that its route chose.

    Args:
        query: [T, N, H] float32, float16 or bfloat16, last dimension contiguous.
        cache: of the same dtype, or of float8.
        out: [T, N, H]; rows without queries or keys are left as they are.
        rows: views of `write_views`, with `kv_batch_idx` and without `seqused_q`.
        workspace: for at least T tokens in its P shares.
        max_query_len: most queries a row has.
        scale: softmax scale.
        sink_logits: [N] of the heads' learned sinks; None for heads without.
        block_n: keys taken at a time; None for the default.

    Host sync: none. CUDA graph: safe; allocates nothing.
    """
    tokens, heads, head_dim = query.shape
    num_rows, kv_heads = rows.seqused_k.shape[0], cache.keys.shape[2]
    group = heads // kv_heads
    splits = workspace.num_splits
    assert workspace.fit(splits, *query.shape).num_splits == splits, "workspace too small"
    assert splits & (splits - 1) == 0, f"{splits} splits, expected a power of two"
    assert query.stride(2) == out.stride(2) == cache.keys.stride(3) == cache.values.stride(3) == 1
    assert rows.kv_batch_idx is not None
    assert rows.seqused_q is None
    if tokens == 0 or num_rows == 0:
        return
    block_n = block_n or default_block_n(head_dim, query.element_size())
    block_m = query_tile(max_query_len, group)
    shared = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_two(head_dim),
        "BLOCK_N": block_n,
        "SPLITS": splits,
    }
    _share_kernel[(num_rows, kv_heads, splits)](
        query,
        cache.keys,
        cache.values,
        out,
        workspace.out,
        workspace.lse,
        *rows[:4],
        sink_logits,
        scale * cache.key_scale * LOG2_E,
        cache.value_scale,
        heads,
        *query.stride()[:2],
        *cache.keys.stride()[:3],
        *cache.values.stride()[:3],
        *out.stride()[:2],
        rows.block_table.stride(0),
        BLOCK_SIZE=cache.keys.shape[1],
        BLOCK_M=block_m,
        INTERPRET=INTERPRETED,
        **shared,
        num_warps=4,
        num_stages=1 if INTERPRETED else 3,
    )
    if splits > 1:
        _join_kernel[(num_rows, heads)](
            out,
            workspace.out,
            workspace.lse,
            rows.query_start_loc,
            rows.seqused_k,
            heads,
            *out.stride()[:2],
            **shared,
            num_warps=4,
        )


@triton.jit
def _row(query_start_loc, seqused_k, row, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """Return a row's first token, queries, keys, and tiles of keys a split."""
    start = tl.load(query_start_loc + row)
    queries = tl.load(query_start_loc + row + 1) - start
    keys = tl.load(seqused_k + row)
    tiles = (keys + BLOCK_N - 1) // BLOCK_N
    return start, queries, keys, (tiles + SPLITS - 1) // SPLITS


@triton.jit
def _share_kernel(
    query,
    key_cache,
    value_cache,
    out,
    share_out,
    share_lse,
    table2,
    kv_batch_idx,
    query_start_loc,
    seqused_k,
    sink_logits,
    scale_log2,
    value_scale,
    heads,
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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    start, queries, keys, split_tiles = _row(query_start_loc, seqused_k, row, BLOCK_N, SPLITS)
    begin = split * split_tiles * BLOCK_N
    if (queries <= 0) | (begin >= keys):
        return
    end = tl.minimum(begin + split_tiles * BLOCK_N, keys)
    table = table2 + tl.load(kv_batch_idx + row).to(tl.int64) * stride_table

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token = (start + m // GROUP).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    position = keys - queries + m // GROUP
    valid = m < queries * GROUP
    stored = valid[:, None] & (d < HEAD_DIM)[None, :]
    q_pointers = query + (token * stride_qt + head * stride_qn)[:, None] + d[None, :]
    q = tl.load(q_pointers, mask=stored, other=0.0)
    key_base = key_cache + kv_head * stride_kh
    value_base = value_cache + kv_head * stride_vh

    largest, total = begin_softmax(sink_logits, head, split == 0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile_start in range(begin, end, BLOCK_N):
        n = tile_start + tl.arange(0, BLOCK_N)
        loaded = (n < end)[:, None] & (d < HEAD_DIM)[None, :]
        block = tl.load(table + n // BLOCK_SIZE, mask=n < end, other=0).to(tl.int64)
        k_offset = block * stride_kb + (n % BLOCK_SIZE) * stride_kt
        k = tl.load(key_base + k_offset[:, None] + d[None, :], mask=loaded, other=0.0)
        v_offset = block * stride_vb + (n % BLOCK_SIZE) * stride_vt
        v = tl.load(value_base + v_offset[:, None] + d[None, :], mask=loaded, other=0.0)
        scores = dot(q, tl.trans(k.to(q.dtype)), None, INTERPRET) * scale_log2
        visible = (n < end)[None, :] & (n[None, :] <= position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        weights, largest, total, acc = softmax_step(scores, largest, total, acc)
        acc = dot(weights.to(q.dtype), v.to(q.dtype), acc, INTERPRET)

    # The last queries' keys may begin in the last share: an earlier query then has none here.
    result = acc / tl.where(total > 0, total, 1.0)[:, None] * value_scale
    if end - begin == keys:
        o_pointers = out + (token * stride_ot + head * stride_on)[:, None] + d[None, :]
        tl.store(o_pointers, result.to(out.dtype.element_ty), mask=stored)
    else:
        share = (token * heads + head) * SPLITS + split
        tl.store(share_out + share[:, None] * HEAD_DIM + d[None, :], result, mask=stored)
        lse = tl.where(total > 0, largest + tl.math.log2(total), NO_SCORE)
        tl.store(share_lse + share, lse, mask=valid)


@triton.jit
def _join_kernel(
    out,
    share_out,
    share_lse,
    query_start_loc,
    seqused_k,
    heads,
    stride_ot,
    stride_on,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    start, queries, keys, split_tiles = _row(query_start_loc, seqused_k, row, BLOCK_N, SPLITS)
    if (queries <= 0) | (keys <= split_tiles * BLOCK_N):
        return  # padding, or one share: written in place
    p = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    used = p * split_tiles * BLOCK_N < keys
    for i in range(0, queries):
        token = (start + i).to(tl.int64)
        share = (token * heads + head) * SPLITS + p
        lse = tl.load(share_lse + share, mask=used, other=float("-inf"))
        weight = tl.math.exp2(lse - tl.max(lse, axis=0))
        weight = weight / tl.sum(weight, axis=0)
        part = tl.load(
            share_out + share[:, None] * HEAD_DIM + d[None, :],
            mask=used[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        joined = tl.sum(part * weight[:, None], axis=0)
        o_pointers = out + token * stride_ot + head * stride_on + d
        tl.store(o_pointers, joined.to(out.dtype.element_ty), mask=d < HEAD_DIM)
