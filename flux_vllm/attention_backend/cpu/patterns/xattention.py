"""XAttention on the CPU: attention by query block over the key blocks that any head kept.

Dimension legend: N query heads.
"""

import torch
from torch.nn import functional

from flux_vllm.attention_backend.cpu.masked import attend_masked
from flux_vllm.attention_backend.cpu.pages import PageLayout
from flux_vllm.attention_backend.cpu.prefill import Chunk
from flux_vllm.patterns import xattention
from flux_vllm.patterns.xattention import BLOCK, choose_blocks


def plan(pattern: xattention.Pattern, chunk: Chunk) -> "BlockPrefill":
    """Plan a chunk by query blocks."""
    return BlockPrefill(pattern, chunk)


class BlockPrefill:
    """One chunk; its key blocks are chosen layer by layer."""

    def __init__(self, pattern: xattention.Pattern, chunk: Chunk) -> None:
        self._pattern = pattern
        self._start = chunk.computed
        self._end = chunk.computed + chunk.scheduled
        self._pages = chunk.block_row[: -(-self._end // chunk.block_size)].long()

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: PageLayout,
        scale: float,
        sink_logits: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attend one layer's queries of the chunk; shapes as in `ChunkPrefill.attend`."""
        start, end = self._start, self._end
        keys, values = layout.gather(kv_cache, self._pages)
        grid = functional.pad(keys[:, :end].float(), (0, 0, 0, -end % BLOCK))
        for block in range(start // BLOCK, -(-end // BLOCK)):
            first, stop = max(start, block * BLOCK), min(end, (block + 1) * BLOCK)
            tile = query[first - start : stop - start].transpose(0, 1)
            kept = self._choose(tile, grid[:, : (block + 1) * BLOCK], block, first, scale)
            blocks = kept.any(dim=0).nonzero()
            picked = (blocks * BLOCK + torch.arange(BLOCK)).flatten()
            picked = picked[picked < stop]
            causal = picked <= torch.arange(first, stop)[:, None]
            output[first - start : stop - start] = attend_masked(
                tile,
                keys[:, picked],
                values[:, picked],
                kept[:, None, picked // BLOCK] & causal,
                scale,
                sink_logits,
            )

    def _choose(
        self, tile: torch.Tensor, keys: torch.Tensor, block: int, first: int, scale: float
    ) -> torch.Tensor:
        """Choose a query block's key blocks: [N, block + 1] bool."""
        stride, queries = self._pattern.stride, tile.shape[1]
        before = first - block * BLOCK
        grid = functional.pad(tile, (0, 0, before, BLOCK - before - queries))
        row = torch.arange(BLOCK // stride)
        present = (row * stride + stride > before) & (row * stride < before + queries)
        return choose_blocks(self._pattern, grid, keys, block, present, scale)[:, 0]
