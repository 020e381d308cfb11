"""SPARSE prefill on the CPU: one request's chunk, as a sparse pattern plans it.

Dimension legend: Q queries of a chunk, N query heads, K kv heads, H head dim, M block-table width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from flux_vllm.attention_backend.cpu.pages import PageLayout


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's queries in a step; their keys are in the cache already."""

    computed: int
    """Position of the first query."""
    scheduled: int
    """Queries Q."""
    prompt_len: int
    block_row: torch.Tensor
    """[M] int32: the request's row of the block table; entries past its length are stale."""
    block_size: int
    """Tokens a block."""


class ChunkPrefill(Protocol):
    """One chunk, planned once a step and used by every SPARSE layer."""

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: PageLayout,
        scale: float,
        sink_logits: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attend one layer's queries of the chunk.

        Args:
            query: [Q, N, H].
            kv_cache: [num_blocks, K, block_size, 2 * H].
            layout: of `kv_cache`.
            scale: of the scores.
            sink_logits: [N] of the heads' learned sinks; None for heads without.
            output: [Q, N, H], written.
        """
