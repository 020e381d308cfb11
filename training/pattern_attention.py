"""SPARSE attention under the server's sparse patterns, over whole prompts with their answers.

A prompt's queries attend as the pattern says for the prompt's chunks. The answer's follow in the
same forward pass, and attend as a server decodes them: to sinks and window. For evaluation alone;
training has `soft_attention.py`.

Dimension legend: B prompts, N query heads, K kv heads, T padded tokens, H head dim.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.patterns import streaming, triangle, xattention
from flux_vllm.patterns.base import SparsePattern
from flux_vllm.patterns.keys import full_keys, sparse_prefill_keys
from training.block_attention import ChosenBlocks, attend_blocks, choose_blocks, pad_to_blocks
from training.soft_attention import Attention, full_attention

ChunkEnds = Sequence[Sequence[int]]
"""For each prompt, where its chunks end; the last is the prompt's length."""


class PatternAttention(Protocol):
    """One layer's SPARSE attention under a pattern."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        chunk_ends: ChunkEnds,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend whole prompts and their answers.

        Args:
            q: [B, N, T, H].
            k: [B, K, T, H].
            v: [B, K, T, H].
            scale: of the scores.
            chunk_ends: of the B prompts.

        Returns: [B, N, T, H]; and the density [B] float32: the attended share of the pairs of a
            prompt's query and a key up to it.
        """
        ...


def make_pattern_attention(
    pattern: SparsePattern, sink_window: Attention, kernel: str
) -> PatternAttention:
    """Choose the implementation of a pattern.

    Args:
        pattern: of `make_pattern`.
        sink_window: attention to the pattern's sinks and window.
        kernel: `flex` or `sdpa`, where a pattern has a choice.

    Raises: UnsupportedConfigurationError: a pattern that only the server knows.
    """
    if isinstance(pattern, triangle.Pattern):
        return _TriangleAttention(pattern, sink_window)
    if isinstance(pattern, streaming.Pattern):
        return _StreamingAttention(pattern, sink_window)
    if isinstance(pattern, xattention.Pattern):
        return _XAttention(pattern, sink_window, kernel)
    raise UnsupportedConfigurationError(
        "expected a sparse pattern among ['streaming', 'triangle', 'xattention'], found "
        f"{pattern.name!r}; measure a router under it on the server"
    )


class _StreamingAttention:
    """Sinks and window, for prompts and answers alike."""

    def __init__(self, pattern: streaming.Pattern, sink_window: Attention) -> None:
        self._pattern = pattern
        self._sink_window = sink_window

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        chunk_ends: ChunkEnds,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        density = _sink_window_density(self._pattern, _prompt_lens(chunk_ends))
        return self._sink_window(q, k, v, scale), _float32(density, q.device)


class _TriangleAttention:
    """Sinks and window, and everything for each prompt's last queries, whatever the chunks."""

    def __init__(self, pattern: triangle.Pattern, sink_window: Attention) -> None:
        self._pattern = pattern
        self._sink_window = sink_window

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        chunk_ends: ChunkEnds,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Every query once more, for the sake of a few: the GPU's fastest kernel has no mask.
        full = full_attention(q, k, v, scale)
        lens = _prompt_lens(chunk_ends)
        head = (lens - self._pattern.tail_tokens).clip(0)
        position = np.arange(q.shape[2])
        in_tail = (head[:, None] <= position) & (position < lens[:, None])
        chosen = torch.from_numpy(in_tail)[:, None, :, None].to(q.device)
        out = torch.where(chosen, full, self._sink_window(q, k, v, scale))
        # The share of pairs in the head, attended as sinks and window; the tail's count whole.
        in_head = head * (head + 1) / (lens * (lens + 1))
        density = 1 - in_head * (1 - _sink_window_density(self._pattern, head))
        return out, _float32(density, q.device)


class _XAttention:
    """Key blocks chosen anew for each query block of each chunk; sinks and window for answers."""

    def __init__(self, pattern: xattention.Pattern, sink_window: Attention, kernel: str) -> None:
        self._pattern = pattern
        self._sink_window = sink_window
        self._kernel = kernel

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        chunk_ends: ChunkEnds,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = self._sink_window(q, k, v, scale)
        tokens = q.shape[2]
        q, k, v = (pad_to_blocks(x) for x in (q, k, v))
        visited = torch.zeros(len(q), device=q.device)
        for chunk in range(max(map(len, chunk_ends))):
            # A prompt with fewer chunks has an empty one at its end.
            edges = [[0, *ends] + [ends[-1]] * chunk for ends in chunk_ends]
            starts, ends = zip(*(row[chunk : chunk + 2] for row in edges), strict=True)
            chosen: ChosenBlocks = choose_blocks(q, k, starts, ends, self._pattern, scale)
            attended = attend_blocks(q, k, v, chosen.kept, scale, self._kernel)[:, :, :tokens]
            out = torch.where(chosen.queries[:, None, :tokens, None], attended, out)
            visited += chosen.visited_keys()
        lens = torch.tensor(_prompt_lens(chunk_ends), device=q.device)
        return out, visited / (lens * (lens + 1) / 2)


def _prompt_lens(chunk_ends: ChunkEnds) -> np.ndarray:
    """[B] int64."""
    return np.array([ends[-1] for ends in chunk_ends])


def _float32(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _sink_window_density(pattern: streaming.Pattern, tokens: np.ndarray) -> np.ndarray:
    """Give the share of pairs that sinks and window have of the first tokens' [B]: float64."""
    start = np.zeros_like(tokens)
    keys = sparse_prefill_keys(start, tokens, pattern.reach)
    return keys / np.maximum(full_keys(start, tokens), 1)


class PromptAttention:
    """A pattern's attention bound to the prompts of a batch; counts how dense it was.

    Args:
        attend: of the pattern.
        chunk_ends: of the batch's prompts.
        device: of the model.
    """

    def __init__(
        self, attend: PatternAttention, chunk_ends: ChunkEnds, device: torch.device
    ) -> None:
        self._attend = attend
        self._chunk_ends = chunk_ends
        self._rows = torch.arange(len(chunk_ends), device=device)
        self._sums = torch.zeros(len(chunk_ends), device=device)
        self._layers = torch.zeros(len(chunk_ends), device=device)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend one layer: q [B, N, T, H], k and v [B, K, T, H], to [B, N, T, H]."""
        out, density = self._attend(q, k, v, scale, self._chunk_ends)
        self._sums.index_add_(0, self._rows, density)
        self._layers.index_add_(0, self._rows, torch.ones_like(density))
        return out

    def select(self, rows: list[int]) -> "PromptAttention":
        """Give the attention of some of the prompts; what it counts is counted here too."""
        chosen = PromptAttention(
            self._attend, [self._chunk_ends[row] for row in rows], self._rows.device
        )
        chosen._rows = self._rows[torch.tensor(rows, device=self._rows.device)]
        chosen._sums, chosen._layers = self._sums, self._layers
        return chosen

    def density(self) -> torch.Tensor:
        """Average over the layers attended so far: [B] float32, NaN for a prompt without any."""
        return self._sums / self._layers
