"""Triangle: streaming in prefill, but for the prompt's last queries, which attend to everything.

The last queries are known by position, so neither chunks nor the prefix cache change who they are:
a query at position p is one of them where p >= prompt tokens - tail_tokens. That holds past the
prompt too, where a preempted request computes its own text again.

Dimension legend: R requests.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flux_vllm.batch import Batch
from flux_vllm.patterns import streaming
from flux_vllm.patterns.base import option_error
from flux_vllm.patterns.keys import full_keys, sparse_prefill_keys


@dataclass(frozen=True, kw_only=True)
class Pattern(streaming.Pattern):
    """Streaming, and every key for queries at positions from prompt tokens - tail_tokens on."""

    name: ClassVar[str] = "triangle"

    tail_tokens: int = 128

    def __post_init__(self) -> None:
        if type(self.tail_tokens) is not int or not 1 <= self.tail_tokens <= 2**30:
            raise option_error("tail_tokens", f"a whole number from 1 to {2**30}", self.tail_tokens)

    @property
    def is_local(self) -> bool:
        """The prompt's last queries read everything."""
        return False

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
