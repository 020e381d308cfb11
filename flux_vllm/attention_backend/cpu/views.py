"""Compacted KV views: what a SPARSE request's decode sees of its block table.

A compacted row lists the blocks that hold the attention sinks, then those that hold the window.
Both edges widen to whole blocks, so a compacted row never has fewer keys than the definition.

Dimension legend: R requests, M table width.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class CompactView:
    """Block table and lengths of rows as SPARSE decode reads them."""

    block_table: torch.Tensor
    """[R, M] int32; entries past cdiv(seq_lens, block_size) are unspecified."""
    seq_lens: torch.Tensor
    """[R] int32: tokens the row attends to, this step's queries included."""


def compact_view(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
    block_size: int,
    sink_tokens: int,
    window_tokens: int,
) -> CompactView:
    """Build the SPARSE decode view of every row.

    A row with several queries (speculative decoding) gets the window of its first one.

    Args:
        block_table: [R, M] int32; entries past a row's length are unspecified.
        seq_lens: [R] int32: tokens, this step's queries included; 0 for padding rows.
        query_lens: [R] int32.
        block_size: tokens a block.
        sink_tokens: first tokens attended.
        window_tokens: latest tokens attended, the query's own included.

    Returns: CompactView; rows whose sinks and window touch are unchanged.
    Host sync: none. CUDA graph: safe.
    """
    width = block_table.shape[1]
    first_query = seq_lens - query_lens
    sink_blocks = -(-sink_tokens // block_size)
    window_start = (first_query - window_tokens + 1).clamp(min=0)
    skipped = (window_start // block_size - sink_blocks).clamp(min=0)
    column = torch.arange(width, device=block_table.device)
    source = torch.where(column < sink_blocks, column, column + skipped[:, None])
    compacted = block_table.gather(1, source.clamp(max=width - 1).long())
    return CompactView(compacted, (seq_lens - skipped * block_size).to(seq_lens.dtype))
