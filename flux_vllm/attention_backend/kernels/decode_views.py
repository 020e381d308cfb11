"""Decode views: one block table with real and compacted rows, and per layer which of them to read.

A layer's attention call gets the same table for all layers, and per row the index of its table
row (`kv_batch_idx`) and its number of keys (`seqused_k`): FULL rows read their real row, SPARSE
rows the compacted one. So one call serves mixed routes, and a CUDA graph replays any of them.
Prefill rows read their real row in one of two passes, full or sparse, each told by `seqused_q`
how many queries of a row are its own (all or none).

Dimension legend: R rows of the batch, C capacity in rows, M table width, L layers, U route slots.
"""

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.tiles import power_of_two
from flux_vllm.router.route import Route

_SPARSE = tl.constexpr(int(Route.SPARSE))
_FULL = tl.constexpr(int(Route.FULL))


def write_decode_views(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    slots: torch.Tensor,
    is_prefill: torch.Tensor,
    routes: torch.Tensor,
    layer_columns: torch.Tensor,
    table2: torch.Tensor,
    compact_lens: torch.Tensor,
    kv_batch_idx: torch.Tensor,
    seqused_k: torch.Tensor,
    full_seqused_q: torch.Tensor,
    sparse_seqused_q: torch.Tensor,
    *,
    block_size: int,
    sink_tokens: int,
    window_tokens: int,
    sparse_beyond_tokens: int,
) -> None:
    """Write this step's views into buffers that live as long as the captured graphs.

    A compacted row holds the blocks of the sinks, then those of the first query's window; where
    the two touch it equals the real row. Prefill rows always read their real row.

    Args:
        block_table: [>= R, M] int32; entries past a row's length are never read.
        seq_lens: [R] int32: tokens, this step's queries included; 0 for padding rows.
        query_start_loc: [R + 1] int32.
        slots: [R] int64 or int32: each row's slot in the route table, -1 for padding.
        is_prefill: [R] int8 or bool: the row computes prompt tokens, its route is not used.
        routes: [U, all layers of the model] int8 of `Route` values; UNDECIDED attends FULL.
        layer_columns: [L] int32: the columns of `routes` that are wanted.
        table2: [2C, M'] int32, out: real rows from 0, compacted rows from C; only the entries
            that a row's length covers are written.
        compact_lens: [C] int32, out: keys of the compacted rows, 0 for padding.
        kv_batch_idx: [L, C] int32, out: r or C + r.
        seqused_k: [L, C] int32, out: keys that row r reads in a layer.
        full_seqused_q: [L, C] int32, out: queries of row r in the full pass of a batch with
            prefill rows; decode rows of either route are in it.
        sparse_seqused_q: [L, C] int32, out: queries of row r in the sparse pass: those of SPARSE
            prefill rows longer than `sparse_beyond_tokens`.
        block_size: tokens a block.
        sink_tokens: first tokens attended under SPARSE.
        window_tokens: latest tokens attended under SPARSE, the query's own included.
        sparse_beyond_tokens: up to so many keys both routes are the same in prefill.

    Host sync: none. CUDA graph: safe; allocates nothing.
    """
    per_layer = (kv_batch_idx, seqused_k, full_seqused_q, sparse_seqused_q)
    assert len({tensor.stride() for tensor in per_layer}) == 1, "per-layer buffers of one layout"
    rows, capacity = seq_lens.shape[0], table2.shape[0] // 2
    width = min(block_table.shape[1], table2.shape[1])
    assert rows <= capacity, f"views hold {capacity} rows, the batch has {rows}"
    if rows == 0:
        return
    columns_per_program = min(1024, power_of_two(width))
    grid = (rows, -(-width // columns_per_program))
    _views_kernel[grid](
        block_table,
        seq_lens,
        query_start_loc,
        slots,
        is_prefill,
        routes,
        layer_columns,
        table2,
        compact_lens,
        kv_batch_idx,
        seqused_k,
        full_seqused_q,
        sparse_seqused_q,
        layer_columns.shape[0],
        width,
        capacity,
        block_table.stride(0),
        routes.stride(0),
        table2.stride(0),
        kv_batch_idx.stride(0),
        BLOCK_SIZE=block_size,
        SINK_TOKENS=sink_tokens,
        WINDOW_TOKENS=window_tokens,
        SPARSE_BEYOND=sparse_beyond_tokens,
        COLUMNS=columns_per_program,
        LAYERS=power_of_two(layer_columns.shape[0]),
        num_warps=4,
    )


@triton.jit
def _views_kernel(
    block_table,
    seq_lens,
    query_start_loc,
    slots,
    is_prefill,
    routes,
    layer_columns,
    table2,
    compact_lens,
    kv_batch_idx,
    seqused_k,
    full_seqused_q,
    sparse_seqused_q,
    num_layers,
    width,
    capacity,
    stride_table,
    stride_routes,
    stride_table2,
    stride_layer,
    BLOCK_SIZE: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    WINDOW_TOKENS: tl.constexpr,
    SPARSE_BEYOND: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    seq_len = tl.load(seq_lens + row)
    queries = tl.load(query_start_loc + row + 1) - tl.load(query_start_loc + row)
    window_start = tl.maximum(seq_len - queries - WINDOW_TOKENS + 1, 0)
    sink_blocks: tl.constexpr = (SINK_TOKENS + BLOCK_SIZE - 1) // BLOCK_SIZE
    skipped = tl.maximum(window_start // BLOCK_SIZE - sink_blocks, 0)

    blocks = tl.minimum((seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE, width)
    source = block_table + row.to(tl.int64) * stride_table
    real = table2 + row.to(tl.int64) * stride_table2
    compacted = table2 + (capacity + row).to(tl.int64) * stride_table2
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.load(source + column, mask=column < blocks, other=0)
    tl.store(real + column, block, mask=column < blocks)
    # Each entry goes where it belongs: sinks keep their column, the window moves left.
    target = tl.where(column < sink_blocks, column, column - skipped)
    kept = (column < sink_blocks) | (column >= sink_blocks + skipped)
    tl.store(compacted + target, block, mask=kept & (column < blocks))

    if chunk == 0:
        compact_len = seq_len - skipped * BLOCK_SIZE
        tl.store(compact_lens + row, compact_len)
        slot = tl.load(slots + row).to(tl.int64)
        prefills = tl.load(is_prefill + row) != 0
        layer = tl.arange(0, LAYERS)
        wanted = layer < num_layers
        column_of_layer = tl.load(layer_columns + layer, mask=wanted, other=0)
        # A padding row takes slot 0's routes and drops them: it has neither keys nor queries.
        from_table = routes + tl.maximum(slot, 0) * stride_routes + column_of_layer
        route = tl.load(from_table, mask=wanted, other=_FULL)
        route = tl.where((slot >= 0) & (seq_len > 0), route, _FULL)
        compact = (route == _SPARSE) & ~prefills
        apart = (route == _SPARSE) & prefills & (seq_len > SPARSE_BEYOND)
        entry = layer * stride_layer + row
        tl.store(kv_batch_idx + entry, row + tl.where(compact, capacity, 0), mask=wanted)
        tl.store(seqused_k + entry, tl.where(compact, compact_len, seq_len), mask=wanted)
        tl.store(full_seqused_q + entry, tl.where(apart, 0, queries), mask=wanted)
        tl.store(sparse_seqused_q + entry, tl.where(apart, queries, 0), mask=wanted)
