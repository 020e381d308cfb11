"""Anti-diagonal scores: how much of a query block's attention each key block holds, by estimate.

Of every stride x stride products of queries and keys the anti-diagonal is summed, which is one
product of vectors of stride * H elements. A softmax over such sums estimates attention; here each
key block's share of it is left as a log-sum-exp, in base 2. Source: arXiv 2503.16428, section 2.1.

Dimension legend: R rows, T packed tokens, N query heads, K kv heads, H head dim, B KV blocks,
M table width, Q tasks, E entries, G strided rows a block (128 / stride).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.block_tasks import BLOCK_TOKENS
from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows
from flux_vllm.attention_backend.kernels.tiles import (
    INTERPRETED,
    LOG2_E,
    NO_SCORE,
    dot,
    is_hopper,
    power_of_two,
)


class ScoreTile(NamedTuple):
    """How one program is sized."""

    block_m: int
    """Rows of the tile: strided rows of all its tasks, times the query heads of a kv head."""
    block_n: int
    """Strided keys."""
    num_warps: int
    num_stages: int


def tasks_a_program(queries_per_kv: int, element_size: int, stride: int) -> int:
    """Return how many query blocks of a row share a program's keys."""
    rows = (128 if element_size == 2 else 64) * stride // BLOCK_TOKENS
    return max(1, min(4, rows // power_of_two(queries_per_kv)))


def default_tile(head_dim: int, element_size: int, queries_per_kv: int, stride: int) -> ScoreTile:
    """Choose a tile that fits the shared memory of Hopper, or elsewhere that of Ada, 99 KiB."""
    tasks = tasks_a_program(queries_per_kv, element_size, stride)
    strided_rows = tasks * (BLOCK_TOKENS // stride)
    block_m = max(16, strided_rows * power_of_two(queries_per_kv))
    if INTERPRETED:
        return ScoreTile(block_m, 32, 4, 1)
    hopper = is_hopper()
    block_n = 128 if hopper and element_size == 2 else 64
    stage = (block_m + block_n) * power_of_two(head_dim) * element_size
    stages = max(1, min(3, (200 if hopper else 90) * 1024 // stage))
    return ScoreTile(block_m, block_n, 8 if block_n == 128 else 4, stages)


def score_blocks(
    query: torch.Tensor,
    cache: KVCache,
    rows: PagedRows,
    tasks: torch.Tensor,
    lse: torch.Tensor,
    *,
    most_blocks: int,
    scale: float,
    stride: int,
) -> None:
    """Estimate attention between query blocks and key blocks, by head.

    A strided row's queries before the chunk, and a strided key's positions past the last key, count
    as zeros. A row sees strided keys up to its own.

    Args:
        query: [T, N, H] float32, float16 or bfloat16, last dimension contiguous.
        cache: of the same dtype, or of float8; its keys are read.
        rows: of the batch, row r's blocks in row r of the table; `seqused_q` is all of a row's
            queries, or 0 to skip it.
        tasks: [Q, 3] int32, see BlockTasks, in groups of `tasks_a_program`.
        lse: [N, E * G] float32, out: of task t from its first entry times G on, [G, blocks]: the
            log2 of the sum of 2^score over each key block; strided rows without a query in the
            chunk are unspecified.
        most_blocks: key blocks of the longest row (host).
        scale: softmax scale.
        stride: of the anti-diagonals; divides 16.

    Host sync: none; allocates nothing.
    """
    heads, head_dim = query.shape[1:]
    key_cache = cache.keys
    kv_heads, block_size = key_cache.shape[2], key_cache.shape[1]
    group = heads // kv_heads
    assert block_size % stride == 0, f"block_size {block_size}, a multiple of stride {stride}"
    assert rows.seqused_q is not None
    assert query.stride(2) == key_cache.stride(3) == lse.stride(1) == 1
    tasks_each = tasks_a_program(group, query.element_size(), stride)
    tile = default_tile(head_dim, query.element_size(), group, stride)
    strided_keys = most_blocks * (BLOCK_TOKENS // stride)
    grid = (len(tasks) // tasks_each, kv_heads, -(-strided_keys // tile.block_n))
    _score_kernel[grid](
        query,
        key_cache,
        rows.block_table,
        rows.query_start_loc,
        rows.seqused_q,
        rows.seqused_k,
        tasks,
        lse,
        scale * cache.key_scale * LOG2_E / stride,
        *query.stride()[:2],
        *key_cache.stride()[:3],
        rows.block_table.stride(0),
        lse.stride(0),
        STRIDE=stride,
        ROWS=BLOCK_TOKENS // stride,
        TASKS=tasks_each,
        BLOCK_SIZE=block_size,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        INTERPRET=INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit(do_not_specialize=["stride_lse"])
def _score_kernel(
    query,
    key_cache,
    block_table,
    query_start_loc,
    seqused_q,
    seqused_k,
    tasks,
    lse,
    scale_log2,
    stride_qt,
    stride_qn,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_table,
    stride_lse,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    TASKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    first_task = tasks + tl.program_id(0) * TASKS * 3
    row = tl.load(first_task)
    block = tl.load(first_task + 1)
    queries = tl.load(seqused_q + row)
    keys = tl.load(seqused_k + row)
    last = tl.minimum((block + TASKS) * ROWS, (keys + STRIDE - 1) // STRIDE) - 1
    first_key = tl.program_id(2) * BLOCK_N
    if (queries == 0) | (first_key > last):
        return
    start = keys - queries
    kv_head = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = first_key + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    task = m % (TASKS * ROWS) // ROWS
    strided = block * ROWS + m % (TASKS * ROWS)
    head = kv_head * GROUP + m // (TASKS * ROWS)
    wanted = (m < TASKS * ROWS * GROUP) & (strided <= last)
    in_use = n * STRIDE < keys
    table = block_table + row.to(tl.int64) * stride_table
    page = tl.load(table + n * STRIDE // BLOCK_SIZE, mask=in_use, other=0).to(tl.int64)
    k_offset = kv_head * stride_kh + page * stride_kb + n * STRIDE % BLOCK_SIZE * stride_kt
    q_token = tl.load(query_start_loc + row) - start
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(STRIDE):
        position = strided * STRIDE + STRIDE - 1 - i
        here = wanted & (position >= start) & (position < keys)
        q_offset = (q_token + position).to(tl.int64) * stride_qt + head * stride_qn
        q = tl.load(
            query + q_offset[:, None] + d[None, :],
            mask=here[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        k = tl.load(
            key_cache + (k_offset + i * stride_kt)[:, None] + d[None, :],
            mask=(n * STRIDE + i < keys)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        scores = dot(q, tl.trans(k.to(q.dtype)), scores, INTERPRET)
    scores = tl.where(n[None, :] <= strided[:, None], scores * scale_log2, NO_SCORE)

    by_block = tl.reshape(scores, [BLOCK_M, BLOCK_N // ROWS, ROWS])
    largest = tl.max(by_block, axis=2)
    total = tl.sum(tl.math.exp2(by_block - largest[:, :, None]), axis=2)
    # A task's blocks end with its own.
    key_block = first_key // ROWS + tl.arange(0, BLOCK_N // ROWS)
    blocks = block + task + 1
    entry = tl.load(first_task + task * 3 + 2, mask=wanted, other=0)
    base = head.to(tl.int64) * stride_lse + entry * ROWS + strided % ROWS * blocks
    tl.store(
        lse + base[:, None] + key_block[None, :],
        largest + tl.math.log2(total),
        mask=wanted[:, None] & (key_block[None, :] < blocks[:, None]),
    )
