"""Triangle: streaming in prefill, but for the prompt's last queries, which attend to everything.

The last queries are known by position, so neither chunks nor the prefix cache change who they are:
a query at position p is one of them where p >= prompt tokens - tail_tokens. That holds past the
prompt too, where a preempted request computes its own text again.

Dimension legend: R requests, Q queries of a chunk, N query heads, H head dim.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from flux_vllm.batch import Batch
from flux_vllm.metrics.keys import full_keys, sparse_prefill_keys
from flux_vllm.patterns import streaming
from flux_vllm.patterns.base import Chunk, CpuPrefill, CudaPrefill, option_error
from flux_vllm.transfer import to_device

if TYPE_CHECKING:
    from flux_vllm.attention_backend.cpu.pages import PageLayout
    from flux_vllm.attention_backend.cuda.calls import Kernels, LayerCall

_TILE_QUERIES = 256


@dataclass(frozen=True, kw_only=True)
class Pattern(streaming.Pattern):
    """Streaming, and every key for queries at positions from prompt tokens - tail_tokens on."""

    tail_tokens: int = 128

    def __post_init__(self) -> None:
        if type(self.tail_tokens) is not int or not 1 <= self.tail_tokens <= 2**30:
            raise option_error("tail_tokens", f"a whole number from 1 to {2**30}", self.tail_tokens)

    @property
    def is_local(self) -> bool:
        """The prompt's last queries read everything."""
        return False

    def visible(
        self, query: torch.Tensor, key: torch.Tensor, prompt_len: int, scale: float
    ) -> torch.Tensor:
        """Build the mask [Q, S]; it does not depend on the data."""
        mask = super().visible(query, key, prompt_len, scale)
        for row, position in enumerate(range(len(key) - len(query), len(key))):
            if position >= prompt_len - self.tail_tokens:
                mask[row, : position + 1] = True
        return mask

    def tails(self, batch: Batch) -> np.ndarray:
        """Count each row's queries, at its end, that attend to everything: [R] int64."""
        begin = batch.prompt_lens - self.tail_tokens
        tails = (batch.computed + batch.scheduled - begin).clip(0, batch.scheduled)
        return np.where(batch.is_prefill, tails, 0)

    def prefill_keys(self, batch: Batch) -> np.ndarray:
        """Count as streaming does, and whole contexts for the tail."""
        tails = self.tails(batch)
        head = batch.scheduled - tails
        return sparse_prefill_keys(batch.computed, head, self.reach) + full_keys(
            batch.computed + head, tails
        )

    def cpu_prefill(self, chunk: Chunk) -> CpuPrefill:
        """Plan the chunk's head as streaming, and its tail apart."""
        end = chunk.computed + chunk.scheduled
        head = max(0, min(chunk.prompt_len - self.tail_tokens, end) - chunk.computed)
        if head == chunk.scheduled:
            return super().cpu_prefill(chunk)
        streamed = Chunk(chunk.computed, head, chunk.prompt_len, chunk.block_row, chunk.block_size)
        return _HeadAndTail(super().cpu_prefill(streamed) if head else None, head, chunk)

    def cuda_prefill(self, batch: Batch, device: torch.device) -> CudaPrefill:
        """Attend as streaming does, then the tails once more, to everything."""
        tails = self.tails(batch)
        if not tails.any():
            return super().cuda_prefill(batch, device)
        return _TailPass(to_device(tails.astype(np.int32), device), int(tails.max()))


class _HeadAndTail:
    """A chunk on the CPU whose last queries attend to everything."""

    def __init__(self, streamed: CpuPrefill | None, head: int, chunk: Chunk) -> None:
        self._streamed = streamed
        self._head = head
        self._computed = chunk.computed
        self._end = chunk.computed + chunk.scheduled
        self._blocks = chunk.block_row[: -(-self._end // chunk.block_size)].long()

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: "PageLayout",
        scale: float,
        output: torch.Tensor,
    ) -> None:
        head = self._head
        if self._streamed is not None:
            self._streamed.attend(query[:head], kv_cache, layout, scale, output[:head])
        keys, values = layout.gather(kv_cache, self._blocks)
        for begin in range(head, len(query), _TILE_QUERIES):
            tile = slice(begin, min(begin + _TILE_QUERIES, len(query)))
            positions = torch.arange(self._computed + tile.start, self._computed + tile.stop)
            end = self._computed + tile.stop
            attended = functional.scaled_dot_product_attention(
                query[None, tile].transpose(1, 2),
                keys[None, :, :end],
                values[None, :, :end],
                attn_mask=torch.arange(end) <= positions[:, None],
                scale=scale,
                enable_gqa=True,
            )
            output[tile] = attended[0].transpose(0, 1)


class _TailPass:
    """A batch on CUDA. A row's tail is a row of its own, that begins further on in the batch."""

    def __init__(self, tails: torch.Tensor, longest: int) -> None:
        self._tails = tails
        self._longest = longest
        self._starts: torch.Tensor | None = None

    def attend(self, call: "LayerCall", kernels: "Kernels") -> None:
        kernels.sink_window_pass(call)
        if self._starts is None:
            rows, all_rows = len(self._tails), call.metadata.seq_lens.shape[0]
            # Padding rows have no tail.
            self._tails = functional.pad(self._tails, (0, all_rows - rows))
            self._starts = call.metadata.query_start_loc.clone()
            self._starts[:-1] = call.metadata.query_start_loc[1:] - self._tails
        # 0 for the rows that this layer does not prefill under SPARSE.
        seqused_q = torch.minimum(call.rows.sparse_seqused_q, self._tails)
        kernels.every_key_pass(call, self._starts, seqused_q, self._longest)
