"""Streaming: attention sinks and a sliding window, exact to the token in prefill."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flux_vllm.batch import Batch
from flux_vllm.patterns.base import SparsePattern
from flux_vllm.patterns.keys import sparse_prefill_keys


@dataclass(frozen=True, kw_only=True)
class Pattern(SparsePattern):
    """A query at position p attends to keys [0, S) and (p - W, p]."""

    name: ClassVar[str] = "streaming"

    @property
    def is_local(self) -> bool:
        """Always."""
        return True

    @property
    def reach(self) -> int:
        """The sinks and the window of the last query."""
        return self.sink_tokens + self.window_tokens

    def prefill_keys(self, batch: Batch) -> np.ndarray:
        """Count S + W keys a query, fewer where the context is shorter."""
        return sparse_prefill_keys(batch.computed, batch.scheduled, self.reach)
