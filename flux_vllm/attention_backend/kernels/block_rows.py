"""Attention over lists of key blocks by FlashAttention-3: each list is a row of one call.

A row is one query block of one query head, with tables of its own: the pages that hold the kept
blocks for its one KV head. The blocks ascend, so a query block's own comes last, and causality
counted from the row's end is causality within that block. Heads are taken in slices, so that what
the rows need is bounded at any length.

Dimension legend: R rows of the batch, T packed tokens, N query heads, K kv heads, H head dim,
B KV blocks, M table width, Q tasks, E entries, P tasks but for padding, S query heads of a slice.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.block_lists import BlockLists
from flux_vllm.attention_backend.kernels.block_tasks import BLOCK_TOKENS
from flux_vllm.attention_backend.kernels.head_pages import HeadPages, head_pages, page_tokens
from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows
from flux_vllm.attention_backend.kernels.tiles import LOG2_E, power_of_two
from flux_vllm.transfer import to_device

_BLOCK = tl.constexpr(BLOCK_TOKENS)
SLICE_NBYTES = 256 << 20
"""Memory that a slice of heads may take, unless one head takes more."""
_SMALLEST_PAGE = 16
"""Tokens of the smallest page that FlashAttention-3 takes."""


class BlockRows(NamedTuple):
    """What the rows of one slice of heads take; a slice after the other uses it."""

    order: torch.Tensor
    """[P] int32: tasks, longest first; row h * P + p is the p-th of them in the slice's head h."""
    query: torch.Tensor
    """[S * P * 128, 1, H]: row r's queries from 128 r on; float8 where the cache is."""
    out: torch.Tensor
    """Likewise, in the dtype of the model."""
    table: torch.Tensor
    """[S * P, entries] int32: pages."""
    starts: torch.Tensor
    """[S * P + 1] int32: 128 r."""
    num_queries: torch.Tensor
    """[S * P] int32, 0 where the row of the batch is switched off."""
    num_keys: torch.Tensor
    """[S * P] int32."""

    @property
    def heads(self) -> int:
        """Return S."""
        return len(self.table) // len(self.order)


def heads_a_slice(num_heads: int, num_tasks: int, most_blocks: int, head_nbytes: int) -> int:
    """Return S, from sizes as in `slice_nbytes`."""
    head = slice_nbytes(1, num_tasks, most_blocks, head_nbytes)
    return max(1, min(num_heads, SLICE_NBYTES // max(1, head)))


def slice_nbytes(heads: int, num_tasks: int, most_blocks: int, head_nbytes: int) -> int:
    """Return the most memory that a slice's rows take, FlashAttention-3's own share included.

    Args:
        heads: S.
        num_tasks: P.
        most_blocks: key blocks of the longest row.
        head_nbytes: of one head's vector.
    """
    table = 4 * most_blocks * (BLOCK_TOKENS // _SMALLEST_PAGE)
    # Of a row: start, lengths and FlashAttention-3's plan; of a query: its log-sum-exp.
    return heads * num_tasks * (2 * BLOCK_TOKENS * head_nbytes + table + 20 + 4 * BLOCK_TOKENS)


def make_block_rows(
    tasks: np.ndarray,
    query: torch.Tensor,
    block_size: int,
    most_blocks: int,
    query_dtype: torch.dtype | None = None,
) -> BlockRows:
    """Allocate a step's rows.

    Args:
        tasks: [Q, 3] int32, see BlockTasks; padding among them gets no row.
        query: [T, N, H], for its sizes.
        block_size: tokens a KV block.
        most_blocks: key blocks of the longest row.
        query_dtype: of the rows' queries, if not that of `query`.

    Host sync: none.
    """
    device, (_, num_heads, head_dim) = query.device, query.shape
    real = np.flatnonzero(tasks[:, 0] >= 0)
    order = real[np.argsort(-tasks[real, 1], kind="stable")].astype(np.int32)
    nbytes = head_dim * query.element_size()
    rows = len(order) * heads_a_slice(num_heads, len(order), most_blocks, nbytes)
    width = most_blocks * (BLOCK_TOKENS // page_tokens(block_size))
    packed = (rows * BLOCK_TOKENS, 1, head_dim)
    return BlockRows(
        to_device(order, device),
        torch.empty(packed, dtype=query_dtype or query.dtype, device=device),
        torch.empty(packed, dtype=query.dtype, device=device),
        torch.empty(rows, width, dtype=torch.int32, device=device),
        torch.arange(rows + 1, dtype=torch.int32, device=device) * BLOCK_TOKENS,
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
    )


def attend_block_rows(
    query: torch.Tensor,
    cache: KVCache,
    out: torch.Tensor,
    lists: BlockLists,
    rows: BlockRows,
    *,
    scale: float,
    sink_logits: torch.Tensor | None = None,
    float8: fa3.Float8Operands | None = None,
) -> None:
    """Attend the rows whose `seqused_q` is not 0; the output of others stays as it is.

    Args:
        query: [T, N, H] float16 or bfloat16, last dimension contiguous.
        cache: of the same dtype or of float8_e4m3fn, keys and values of the same strides,
            block_size a multiple of 16.
        out: [T, N, H], written for attended rows only.
        lists: of the layer.
        rows: of the step, from `make_block_rows`.
        scale: softmax scale.
        sink_logits: [N] of the heads' learned sinks; None for heads without.
        float8: of a float8 cache, whose queries are read instead.

    Host sync: none.
    """
    pages = head_pages(cache.keys, cache.values)
    attended = query if float8 is None else float8.query
    for first_head in range(0, query.shape[1], rows.heads):
        heads = range(first_head, min(first_head + rows.heads, query.shape[1]))
        write_tables(cache.keys, pages, lists, rows, heads, query.shape[1])
        gather_queries(attended, lists, rows, heads)
        lse = attend_rows(pages, rows, heads, scale, float8)
        scatter_outputs(out, lists, rows, heads, lse, sink_logits)


def attend_rows(
    pages: HeadPages,
    rows: BlockRows,
    heads: range,
    scale: float,
    float8: fa3.Float8Operands | None = None,
) -> torch.Tensor:
    """Make the call: from `rows.query` to `rows.out`.

    Args:
        pages: of the layer.
        rows: of the step, a slice's queries gathered.
        heads: of the slice.
        scale: softmax scale.
        float8: of a float8 cache, for its scales.

    Returns: lse [1, queries] float32, natural logarithm; without learned sinks, of which a call
        takes one a head, and here all heads are one.
    """
    number = len(heads) * len(rows.order)
    queries = slice(number * BLOCK_TOKENS)
    query = rows.query[queries]
    return fa3.attend(
        query,
        KVCache(pages.keys, pages.values),
        rows.out[queries],
        PagedRows(
            rows.table[:number],
            None,
            rows.starts[: number + 1],
            rows.num_keys[:number],
            rows.num_queries[:number],
        ),
        # One tile's queries: keys are then never loaded by TMA, which would read past a row's.
        max_query_len=BLOCK_TOKENS,
        max_seq_len=rows.table.shape[1] * pages.keys.shape[1],
        scale=scale,
        num_splits=1,
        float8=None if float8 is None else float8._replace(query=query),
    )


def write_tables(
    key_cache: torch.Tensor,
    pages: HeadPages,
    lists: BlockLists,
    rows: BlockRows,
    heads: range,
    num_heads: int,
) -> None:
    """Write tables and lengths of a slice; of rows that are switched off the lengths alone.

    Args:
        key_cache: [B, block_size, K, H].
        pages: of it.
        lists: of the layer.
        rows: `table`, `num_queries` and `num_keys` are written.
        heads: of the slice.
        num_heads: N.
    """
    _table_kernel[(len(rows.order), len(heads))](
        *lists[:1],
        *lists[2:],
        rows.order,
        rows.table,
        rows.num_queries,
        rows.num_keys,
        heads.start,
        lists.block_table.stride(0),
        lists.chosen.stride(0),
        lists.counts.stride(0),
        rows.table.stride(0),
        pages.block_pages,
        pages.part_pages,
        pages.head_pages,
        BLOCK_SIZE=key_cache.shape[1],
        PAGE_TOKENS=pages.keys.shape[1],
        GROUP=num_heads // key_cache.shape[2],
        WIDTH=256,
        num_warps=2,
    )


def gather_queries(query: torch.Tensor, lists: BlockLists, rows: BlockRows, heads: range) -> None:
    """Copy a slice's queries [T, N, H] to `rows.query`."""
    _copy(query, rows.query, lists, rows, heads, gather=True)


def scatter_outputs(
    out: torch.Tensor,
    lists: BlockLists,
    rows: BlockRows,
    heads: range,
    lse: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Copy a slice's `rows.out` to [T, N, H], where rows are attended.

    Args:
        out: [T, N, H], written.
        lists: of the layer.
        rows: of the step.
        heads: of the slice.
        lse: of `attend_rows`; read where heads have learned sinks.
        sink_logits: [N] of those, which take their share of each query's softmax here; or None.
    """
    assert sink_logits is None or lse is not None
    _copy(out, rows.out, lists, rows, heads, lse, sink_logits, gather=False)


def _copy(
    packed: torch.Tensor,
    by_row: torch.Tensor,
    lists: BlockLists,
    rows: BlockRows,
    heads: range,
    lse: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    *,
    gather: bool,
) -> None:
    assert packed.stride(2) == 1
    assert by_row.is_contiguous()
    head_dim = packed.shape[2]
    _copy_kernel[(len(rows.order), len(heads))](
        packed,
        by_row,
        lse,
        sink_logits,
        *lists[1:5],
        rows.order,
        heads.start,
        *packed.stride()[:2],
        LOG2_E=LOG2_E,
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        GATHER=gather,
        num_warps=4,
    )


@triton.jit
def _queries_of(task, seqused_q, seqused_k, tasks):
    """Return a task's row of the batch, its block, and its queries' positions [first, end)."""
    row = tl.load(tasks + task * 3)
    block = tl.load(tasks + task * 3 + 1)
    keys = tl.load(seqused_k + row)
    first = tl.maximum(block * _BLOCK, keys - tl.load(seqused_q + row))
    return row, block, first, tl.minimum((block + 1) * _BLOCK, keys)


@triton.jit(
    do_not_specialize=["first_head", "stride_chosen", "stride_counts", "stride_rows"],
)
def _table_kernel(
    block_table,
    seqused_q,
    seqused_k,
    tasks,
    chosen,
    counts,
    order,
    table,
    num_queries,
    num_keys,
    first_head,
    stride_table,
    stride_chosen,
    stride_counts,
    stride_rows,
    block_pages,
    part_pages,
    head_pages,
    BLOCK_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    task = tl.load(order + tl.program_id(0))
    head = first_head + tl.program_id(1)
    index = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    row, block, first, end = _queries_of(task, seqused_q, seqused_k, tasks)
    if tl.load(seqused_q + row) == 0:
        tl.store(num_queries + index, 0)
        tl.store(num_keys + index, 0)
        return
    count = tl.load(counts + head.to(tl.int64) * stride_counts + task)
    tl.store(num_queries + index, end - first)
    tl.store(num_keys + index, (count - 1) * _BLOCK + end - block * _BLOCK)
    listed = chosen + head.to(tl.int64) * stride_chosen + tl.load(tasks + task * 3 + 2)
    blocks = block_table + row.to(tl.int64) * stride_table
    pages_each: tl.constexpr = _BLOCK // PAGE_TOKENS
    for begin in range(0, count * pages_each, WIDTH):
        entry = begin + tl.arange(0, WIDTH)
        in_list = entry < count * pages_each
        key_block = tl.load(listed + entry // pages_each, mask=in_list, other=0)
        position = key_block * _BLOCK + entry % pages_each * PAGE_TOKENS
        held = in_list & (position < end)
        page = tl.load(blocks + position // BLOCK_SIZE, mask=held, other=0) * block_pages
        page += position % BLOCK_SIZE // PAGE_TOKENS * part_pages + head // GROUP * head_pages
        tl.store(table + index * stride_rows + entry, page, mask=held)


@triton.jit(do_not_specialize=["first_head"])
def _copy_kernel(
    packed,
    by_row,
    lse,
    sink_logits,
    query_start_loc,
    seqused_q,
    seqused_k,
    tasks,
    order,
    first_head,
    stride_token,
    stride_head,
    LOG2_E: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr,
):
    task = tl.load(order + tl.program_id(0))
    head = first_head + tl.program_id(1)
    index = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    row, block, first, end = _queries_of(task, seqused_q, seqused_k, tasks)
    queries = tl.load(seqused_q + row)
    if queries == 0:
        return
    q = tl.arange(0, _BLOCK)
    d = tl.arange(0, BLOCK_D)
    present = (q < end - first)[:, None] & (d < HEAD_DIM)[None, :]
    start = tl.load(query_start_loc + row) + first - (tl.load(seqused_k + row) - queries)
    token = (start + q).to(tl.int64)
    outside = packed + (token * stride_token + head * stride_head)[:, None] + d[None, :]
    of_row = index.to(tl.int64) * _BLOCK + q
    inside = by_row + of_row[:, None] * HEAD_DIM + d[None, :]
    if GATHER:
        tl.store(inside, tl.load(outside, mask=present), mask=present)
    else:
        attended = tl.load(inside, mask=present)
        if sink_logits is not None:
            logit = tl.load(sink_logits + head).to(tl.float32)
            beyond = logit - tl.load(lse + of_row, mask=q < end - first, other=0.0)
            share = 1 / (1 + tl.math.exp2(beyond * LOG2_E))
            attended = (attended.to(tl.float32) * share[:, None]).to(packed.dtype.element_ty)
        tl.store(outside, attended, mask=present)
