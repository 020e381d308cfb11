"""Triangle on the CPU: the chunk's head as streaming, and its tail over every key.

Dimension legend: Q queries of a chunk, N query heads, H head dim.
"""

import torch

from flux_vllm.attention_backend.cpu.masked import attend_masked
from flux_vllm.attention_backend.cpu.pages import PageLayout
from flux_vllm.attention_backend.cpu.patterns import streaming
from flux_vllm.attention_backend.cpu.prefill import Chunk, ChunkPrefill
from flux_vllm.patterns import triangle

_TILE_QUERIES = 256


def plan(pattern: triangle.Pattern, chunk: Chunk) -> ChunkPrefill:
    """Plan the chunk's head as streaming, and its tail apart."""
    end = chunk.computed + chunk.scheduled
    head = max(0, min(chunk.prompt_len - pattern.tail_tokens, end) - chunk.computed)
    if head == chunk.scheduled:
        return streaming.plan(pattern, chunk)
    streamed = Chunk(chunk.computed, head, chunk.prompt_len, chunk.block_row, chunk.block_size)
    return _HeadAndTail(streaming.plan(pattern, streamed) if head else None, head, chunk)


class _HeadAndTail:
    """A chunk whose last queries attend to everything."""

    def __init__(self, streamed: ChunkPrefill | None, head: int, chunk: Chunk) -> None:
        self._streamed = streamed
        self._head = head
        self._computed = chunk.computed
        self._end = chunk.computed + chunk.scheduled
        self._blocks = chunk.block_row[: -(-self._end // chunk.block_size)].long()

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: PageLayout,
        scale: float,
        sink_logits: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        head = self._head
        if self._streamed is not None:
            streamed = output[:head]
            self._streamed.attend(query[:head], kv_cache, layout, scale, sink_logits, streamed)
        keys, values = layout.gather(kv_cache, self._blocks)
        for begin in range(head, len(query), _TILE_QUERIES):
            tile = slice(begin, min(begin + _TILE_QUERIES, len(query)))
            positions = torch.arange(self._computed + tile.start, self._computed + tile.stop)
            end = self._computed + tile.stop
            output[tile] = attend_masked(
                query[tile].transpose(0, 1),
                keys[:, :end],
                values[:, :end],
                torch.arange(end) <= positions[:, None],
                scale,
                sink_logits,
            )
