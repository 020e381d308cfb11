"""Streaming: attention sinks and a sliding window, exact to the token in prefill."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from flux_vllm.attention_backend import naive
from flux_vllm.batch import Batch
from flux_vllm.metrics.keys import sparse_prefill_keys
from flux_vllm.patterns.base import Chunk, CpuPrefill, CudaPrefill, SparsePattern

if TYPE_CHECKING:
    from flux_vllm.attention_backend.cuda.calls import Kernels, LayerCall


@dataclass(frozen=True, kw_only=True)
class Pattern(SparsePattern):
    """A query at position p attends to keys [0, S) and (p - W, p]."""

    @property
    def is_local(self) -> bool:
        """Always."""
        return True

    @property
    def reach(self) -> int:
        """The sinks and the window of the last query."""
        return self.sink_tokens + self.window_tokens

    def visible(
        self, query: torch.Tensor, key: torch.Tensor, prompt_len: int, scale: float
    ) -> torch.Tensor:
        """Build the mask [Q, S]; it does not depend on the data."""
        positions = range(len(key) - len(query), len(key))
        return naive.prefill_mask(positions, naive.SPARSE, self.sink_tokens, self.window_tokens)

    def prefill_keys(self, batch: Batch) -> np.ndarray:
        """Count S + W keys a query, fewer where the context is shorter."""
        return sparse_prefill_keys(batch.computed, batch.scheduled, self.reach)

    def cpu_prefill(self, chunk: Chunk) -> CpuPrefill:
        """Plan tiles of queries over gathered sinks and window."""
        from flux_vllm.attention_backend.cpu.sink_window import SparsePrefill

        return SparsePrefill(
            chunk.computed,
            chunk.scheduled,
            chunk.block_row,
            chunk.block_size,
            self.sink_tokens,
            self.window_tokens,
        )

    def cuda_prefill(self, batch: Batch, device: torch.device) -> CudaPrefill:
        """Take the kernels' own pass; there is nothing to plan."""
        return _SinkWindowPass()


class _SinkWindowPass:
    def attend(self, call: "LayerCall", kernels: "Kernels") -> None:
        kernels.sink_window_pass(call)
