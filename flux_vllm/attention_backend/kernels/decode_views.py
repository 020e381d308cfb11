"""Views: block tables with real and compacted rows, and per layer which of them to read.

A layer's attention call gets the table of its KV cache group, and per row the index of its table
row (`kv_batch_idx`) and its number of keys (`seqused_k`): FULL rows read their real row, SPARSE
rows the compacted one. So one call serves mixed routes, and a CUDA graph replays any of them.
Prefill rows read their real row in one of two passes, full or sparse, each told by `seqused_q`
how many queries of a row are its own (all or none).

One launch writes the views of all layers and groups. All it reads lies where it was in the step
before (vLLM's tables and lengths, the rows' routes), so a captured graph begins with it.

Dimension legend: R rows of the batch, C capacity in rows, M table width, L layers, G KV cache
groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.tiles import power_of_two
from flux_vllm.router.route import Route

NO_REQUEST = -2
"""Beside `Route` values: the row stands for no request. It attends FULL and counts nothing."""

_NO_REQUEST = tl.constexpr(NO_REQUEST)
_UNDECIDED = tl.constexpr(int(Route.UNDECIDED))
_SPARSE = tl.constexpr(int(Route.SPARSE))
_FULL = tl.constexpr(int(Route.FULL))
_COLUMNS = 1024


class ViewSizes(NamedTuple):
    """Numbers that views are made by; tokens."""

    block_size: int
    sink_tokens: int
    """First tokens attended under SPARSE."""
    window_tokens: int
    """Latest tokens attended under SPARSE, the query's own included."""
    sparse_beyond_tokens: int
    """Up to so many keys both routes are the same in prefill."""
    sparse_prefill: bool = False
    """Whether FULL is of decode alone: prefill rows of either route go to the sparse pass."""


class StepRows(NamedTuple):
    """The rows of a step, on the device."""

    seq_lens: torch.Tensor
    """[R] int32: tokens, this step's queries included; 0 for padding rows."""
    query_start_loc: torch.Tensor
    """[R + 1] int32."""
    routes: torch.Tensor
    """[C, layers of the model] int8 of `Route` values or NO_REQUEST; UNDECIDED attends FULL."""
    sparse_from: torch.Tensor | None
    """[C] int32: up to so many tokens a SPARSE layer decodes with full attention; None: 0."""
    is_prefill: torch.Tensor | None
    """[C] int8: the row computes prompt tokens; None where no row does."""


class RoutedColumns(NamedTuple):
    """Where the layers of the views find their routes."""

    columns: torch.Tensor
    """[L] int32: columns of `StepRows.routes`."""
    is_routed: torch.Tensor
    """[L] int8: 0 for a layer that attends as the model has it, and is not counted."""


class LayerViews(NamedTuple):
    """What each layer reads, out; each [L, C] int32."""

    kv_batch_idx: torch.Tensor
    """r or C + r."""
    seqused_k: torch.Tensor
    """Keys that row r reads in a layer."""
    full_seqused_q: torch.Tensor
    """Queries of row r in the full pass of a batch with prefill rows; decode rows of either route
    are in it."""
    sparse_seqused_q: torch.Tensor
    """Queries of row r in the sparse pass: those of SPARSE prefill rows longer than
    `sparse_beyond_tokens`."""


class GroupTables(NamedTuple):
    """Block tables of all groups, which need not lie in one tensor."""

    source: torch.Tensor
    """[>= R, M] int32: vLLM's of the first group; entries past a row's length are never read."""
    target: torch.Tensor
    """[2C, M] int32, out: the first group's view, real rows from 0, compacted rows from C; only
    the entries that a row's length covers are written."""
    layout: torch.Tensor
    """[G, 4] int64: of each group, entries from the first group's source to its own, from row to
    row of that, and likewise of its target."""

    @staticmethod
    def measure(
        sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> list[list[int]]:
        """Return the values of `layout` for these tables."""
        layout = []
        for source, target in zip(sources, targets, strict=True):
            entry = source.element_size()
            layout.append(
                [
                    (source.data_ptr() - sources[0].data_ptr()) // entry,
                    source.stride(0),
                    (target.data_ptr() - targets[0].data_ptr()) // entry,
                    target.stride(0),
                ]
            )
        return layout


def write_views(
    tables: GroupTables,
    rows: StepRows,
    layers: RoutedColumns,
    views: LayerViews,
    totals: torch.Tensor | None,
    sizes: ViewSizes,
    *,
    width: int,
) -> None:
    """Write a step's views into buffers that live as long as the captured graphs.

    A compacted row holds the blocks of the sinks, then those of the first query's window; where
    the two touch it equals the real row. Prefill rows always read their real row.

    Args:
        tables: of all groups.
        rows: of the step.
        layers: of all groups.
        views: out; without prefill rows the `seqused_q` of the passes are left as they are.
        totals: [3, C] int64, in and out: see `DecodeCounts`; None where the host counts the step.
        sizes: of the views.
        width: M, of the narrowest table.

    Host sync: none. CUDA graph: safe; allocates nothing.
    """
    assert len({tensor.stride() for tensor in views}) == 1, "per-layer buffers of one layout"
    num_rows, capacity = rows.seq_lens.shape[0], tables.target.shape[0] // 2
    assert num_rows <= capacity, f"views hold {capacity} rows, the batch has {num_rows}"
    if num_rows == 0:
        return
    num_layers = layers.columns.shape[0]
    columns = min(_COLUMNS, power_of_two(width))
    grid = (num_rows, -(-width // columns), tables.layout.shape[0])
    _views_kernel[grid](
        *tables,
        *rows,
        *layers,
        *views,
        totals,
        num_layers,
        width,
        capacity,
        rows.routes.stride(0),
        views.seqused_k.stride(0),
        BLOCK_SIZE=sizes.block_size,
        SINK_TOKENS=sizes.sink_tokens,
        WINDOW_TOKENS=sizes.window_tokens,
        SPARSE_BEYOND=sizes.sparse_beyond_tokens,
        SPARSE_PREFILL=sizes.sparse_prefill,
        COLUMNS=columns,
        LAYERS=power_of_two(num_layers),
        num_warps=4,
    )


@triton.jit
def _write_row(
    source, target, layout, group, row, chunk, blocks, skipped, capacity,
    SINK_BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy a part of a real row, and its part of the compacted one."""
    of_group = layout + group * 4
    source += tl.load(of_group) + row * tl.load(of_group + 1)
    stride = tl.load(of_group + 3)
    target += tl.load(of_group + 2)
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.load(source + column, mask=column < blocks, other=0)
    tl.store(target + row * stride + column, block, mask=column < blocks)
    # Each entry goes where it belongs: sinks keep their column, the window moves left.
    moved = tl.where(column < SINK_BLOCKS, column, column - skipped)
    kept = (column < SINK_BLOCKS) | (column >= SINK_BLOCKS + skipped)
    tl.store(target + (capacity + row) * stride + moved, block, mask=kept & (column < blocks))


@triton.jit
def _count_row(totals, capacity, row, seq_len, queries, skipped_keys, routed, route, REACH):
    """Add what a decode row reads in all its layers to the totals of its place."""
    own = queries.to(tl.int64) * (queries + 1) // 2
    context = queries.to(tl.int64) * (seq_len - queries) + own
    saved = queries.to(tl.int64) * skipped_keys
    counted = (routed & (route != _NO_REQUEST)).to(tl.int64)
    num_layers = tl.sum(counted, axis=0)
    num_sparse = tl.sum((route == _SPARSE).to(tl.int64) * counted, axis=0)
    open_layers = tl.sum((route == _UNDECIDED).to(tl.int64) * counted, axis=0)
    of_row = totals + row
    attended = num_layers * context - num_sparse * saved
    unrouted = ((open_layers > 0) & (seq_len > REACH)).to(tl.int64)
    tl.store(of_row, tl.load(of_row) + attended)
    of_row += capacity
    tl.store(of_row, tl.load(of_row) + num_layers * context)
    of_row += capacity
    tl.store(of_row, tl.load(of_row) + unrouted)


@triton.jit
def _views_kernel(
    source,
    target,
    layout,
    seq_lens,
    query_start_loc,
    routes,
    sparse_from,
    is_prefill,
    columns,
    is_routed,
    kv_batch_idx,
    seqused_k,
    full_seqused_q,
    sparse_seqused_q,
    totals,
    num_layers,
    width,
    capacity,
    stride_routes,
    stride_layer,
    BLOCK_SIZE: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    WINDOW_TOKENS: tl.constexpr,
    SPARSE_BEYOND: tl.constexpr,
    SPARSE_PREFILL: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    group = tl.program_id(2)
    sink_blocks: tl.constexpr = (SINK_TOKENS + BLOCK_SIZE - 1) // BLOCK_SIZE
    seq_len = tl.load(seq_lens + row)
    queries = tl.load(query_start_loc + row + 1) - tl.load(query_start_loc + row)
    window_start = tl.maximum(seq_len - queries - WINDOW_TOKENS + 1, 0)
    skipped = tl.maximum(window_start // BLOCK_SIZE - sink_blocks, 0)
    blocks = tl.minimum((seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE, width)
    if chunk * COLUMNS < blocks:
        _write_row(source, target, layout, group, row, chunk, blocks, skipped, capacity,
                   sink_blocks, COLUMNS)  # fmt: skip
    if (chunk == 0) & (group == 0):
        layer = tl.arange(0, LAYERS)
        wanted = layer < num_layers
        column = tl.load(columns + layer, mask=wanted, other=0)
        route = tl.load(routes + row * stride_routes + column, mask=wanted, other=_FULL)
        is_sparse = (route == _SPARSE) & (seq_len > 0)
        entry = layer * stride_layer + row
        compact = is_sparse
        skipped_keys = skipped * BLOCK_SIZE
        if sparse_from is not None:
            is_late = seq_len > tl.load(sparse_from + row)
            compact = compact & is_late
            skipped_keys = tl.where(is_late, skipped_keys, 0)
        if is_prefill is not None:
            prefills = tl.load(is_prefill + row) != 0
            apart = is_sparse
            if SPARSE_PREFILL:
                apart = apart | (route == _FULL)
            apart = apart & prefills & (seq_len > SPARSE_BEYOND)
            tl.store(full_seqused_q + entry, tl.where(apart, 0, queries), mask=wanted)
            tl.store(sparse_seqused_q + entry, tl.where(apart, queries, 0), mask=wanted)
            compact = compact & ~prefills
        tl.store(kv_batch_idx + entry, row + tl.where(compact, capacity, 0), mask=wanted)
        tl.store(seqused_k + entry, seq_len - tl.where(compact, skipped_keys, 0), mask=wanted)
        if totals is not None:
            routed = wanted & (tl.load(is_routed + layer, mask=wanted, other=0) != 0)
            _count_row(totals, capacity, row, seq_len, queries, skipped_keys, routed,
                       route, SINK_TOKENS + WINDOW_TOKENS)  # fmt: skip
