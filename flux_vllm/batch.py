"""Batch: the requests of one engine step, the same from either of vLLM's model runners."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of the batch that is about to run, in the runner's order.

    This is the only thing that knows requests: vLLM's attention metadata has neither their ids
    nor their prompts' lengths. `hooks/rows.py` fills it. A dummy run (warm-up, profiling, graph
    capture) has no Batch.
    """

    request_ids: tuple[str, ...]
    """[R]."""
    prompt_lens: np.ndarray
    """[R] int64: tokens of the prompt."""
    computed: np.ndarray
    """[R] int64: tokens in the KV cache before this step."""
    scheduled: np.ndarray
    """[R] int64: tokens of this step; computed + scheduled are the request's known tokens at
    most."""
    is_prefill: np.ndarray
    """[R] bool: computes tokens that are not the newest of a generation: prompt, or a recomputed
    past. Rows with False decode."""
    is_warmup: bool = False
    """Requests of vLLM's own warm-up: they run as real ones and are never counted."""

    def __post_init__(self) -> None:
        rows = len(self.request_ids)
        for name in ("prompt_lens", "computed", "scheduled", "is_prefill"):
            if getattr(self, name).shape != (rows,):
                raise AssertionError(f"{name}: one entry a request expected")

    @classmethod
    def concatenate(cls, batches: Sequence["Batch"]) -> "Batch":
        """Put the rows of several batches, at least one, one after another."""
        if len(batches) == 1:
            return batches[0]
        arrays = {
            name: np.concatenate([getattr(batch, name) for batch in batches])
            for name in ("prompt_lens", "computed", "scheduled", "is_prefill")
        }
        return cls(tuple(name for batch in batches for name in batch.request_ids), **arrays)

    @property
    def has_prefill(self) -> bool:
        """Whether any row is not a decode row."""
        return bool(self.is_prefill.any())

    def __len__(self) -> int:
        return len(self.request_ids)
