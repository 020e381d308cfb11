"""Streaming on the CPU: attention sinks and a sliding window, by tiles of queries.

Dimension legend: T queries of the chunk, N query heads, K KV heads, H head dim.
"""

from dataclasses import dataclass

import torch

from flux_vllm.attention_backend.cpu.masked import attend_masked
from flux_vllm.attention_backend.cpu.pages import PageLayout
from flux_vllm.attention_backend.cpu.prefill import Chunk
from flux_vllm.patterns import streaming

_TILE_QUERIES = 256


@dataclass(frozen=True, slots=True)
class _Tile:
    """Consecutive queries and the keys any of them attends to."""

    begin: int
    """First query, counted within the chunk."""
    end: int
    first_key: int
    """Position of the first window key; keys before sink_tokens come apart from them."""
    mask: torch.Tensor
    """[queries, sinks + window keys] bool."""


def plan(pattern: streaming.Pattern, chunk: Chunk) -> "SinkWindowPrefill":
    """Plan tiles of queries over gathered sinks and window."""
    return SinkWindowPrefill(pattern, chunk)


class SinkWindowPrefill:
    """One chunk, planned once a step and used by every SPARSE layer.

    Args:
        pattern: a query at position p attends to keys [0, S) and (p - W, p].
        chunk: T queries; their keys are in the cache already.
    """

    def __init__(self, pattern: streaming.Pattern, chunk: Chunk) -> None:
        computed, scheduled = chunk.computed, chunk.scheduled
        block_row, block_size = chunk.block_row, chunk.block_size
        window_tokens = pattern.window_tokens
        end = computed + scheduled
        self.sink_tokens = min(pattern.sink_tokens, end)
        sink_blocks = -(-self.sink_tokens // block_size)
        first_block = max(0, computed - window_tokens + 1) // block_size
        # Where sinks and window touch, a block is read once.
        first_block = max(first_block, sink_blocks)
        last_block = -(-end // block_size)
        self.window_origin = first_block * block_size
        self.sink_width = sink_blocks * block_size
        self.blocks = torch.cat([block_row[:sink_blocks], block_row[first_block:last_block]]).long()
        self.tiles = [
            self._tile(computed, begin, min(begin + _TILE_QUERIES, scheduled), window_tokens)
            for begin in range(0, scheduled, _TILE_QUERIES)
        ]

    def _tile(self, computed: int, begin: int, end: int, window_tokens: int) -> _Tile:
        query = torch.arange(computed + begin, computed + end)[:, None]
        first_key = max(self.sink_tokens, computed + begin - window_tokens + 1)
        first_key = min(first_key, computed + end)  # a tile that lies within the sinks
        sinks = torch.arange(self.sink_tokens)
        window = torch.arange(first_key, computed + end)
        return _Tile(
            begin,
            end,
            first_key,
            torch.cat(
                [sinks <= query, (window <= query) & (window > query - window_tokens)], dim=1
            ),
        )

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
            query: [T, N, H].
            kv_cache: [num_blocks, K, block_size, 2 * H].
            layout: of `kv_cache`.
            scale: of the scores.
            sink_logits: [N] of the heads' learned sinks; None for heads without.
            output: [T, N, H], written.
        """
        keys, values = layout.gather(kv_cache, self.blocks)
        for tile in self.tiles:
            end = tile.first_key + tile.mask.shape[1] - self.sink_tokens
            picked = torch.cat(
                [
                    torch.arange(self.sink_tokens),
                    torch.arange(self._column(tile.first_key), self._column(end)),
                ]
            )
            output[tile.begin : tile.end] = attend_masked(
                query[tile.begin : tile.end].transpose(0, 1),
                keys[:, picked],
                values[:, picked],
                tile.mask,
                scale,
                sink_logits,
            )

    def _column(self, position: int) -> int:
        """Map a window key's position to its column among the gathered keys."""
        if position < self.sink_width:
            return position
        return position - self.window_origin + self.sink_width
