"""From single prompts to padded micro-batches, sorted by length.

Dimension legend: B prompts, T padded tokens, A answer tokens of all prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flux_vllm.router.inputs import RouterInputs
from training.data.encoding import Encoded
from training.probe import ProbeBatch, collate_probes

_PAD_TO = 128
"""Lengths are padded to a multiple of this: few distinct shapes, aligned masks."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Prompts computed at once."""

    indices: list[int]
    """[B] places of the prompts in the step's batch."""
    tasks: list[str]
    token_ids: torch.Tensor
    """[B, T] int64, padded at the end with 0."""
    is_tail: torch.Tensor
    """[B, T] bool: the `DenseQueries`, which attend to everything under both routes."""
    probe: ProbeBatch
    """What the routers look at."""
    answer_rows: torch.Tensor
    """[A] int64: prompt of each answer token."""
    answer_positions: torch.Tensor
    """[A] int64: position whose hidden state predicts the token."""
    answer_tokens: torch.Tensor
    """[A] int64."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to a device."""
        return MicroBatch(
            self.indices,
            self.tasks,
            self.token_ids.to(device),
            self.is_tail.to(device),
            self.probe.to(device),
            self.answer_rows.to(device),
            self.answer_positions.to(device),
            self.answer_tokens.to(device),
        )


def group_by_length(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Group prompts of similar length so that no group exceeds the budget, padding included.

    Args:
        lengths: tokens of each prompt.
        token_budget: of a group; a longer prompt makes a group of its own.

    Yields: indices, longest prompts first.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        rows = max(1, token_budget // _padded(lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


def _padded(length: int) -> int:
    return -(-length // _PAD_TO) * _PAD_TO


class DenseQueries(NamedTuple):
    """Queries around a prompt's end that attend to everything under SPARSE too."""

    tail_tokens: int = 0
    """The prompt's last."""
    full_decode_tokens: int = 0
    """The answer's first."""


_NO_QUERIES = DenseQueries()


def collate(
    prompts: Sequence[Encoded],
    indices: list[int],
    inputs: RouterInputs,
    answer_tokens: int | None = None,
    skip_prefix: bool = False,
    dense: DenseQueries = _NO_QUERIES,
) -> MicroBatch:
    """Pad prompts into one rectangle.

    Args:
        prompts: B of them.
        indices: their places in the step's batch.
        inputs: of the routers.
        answer_tokens: most answer tokens of a prompt to look at, evenly spaced; None: all.
        skip_prefix: look at an open answer only after its prefix, as if that had been forced.
        dense: queries that SPARSE shows everything.

    Returns: MicroBatch, on the CPU.
    """
    width = _padded(max(map(len, prompts)))
    token_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    is_tail = torch.zeros(len(prompts), width, dtype=torch.bool)
    rows, positions, tokens = [], [], []
    for row, prompt in enumerate(prompts):
        ids = torch.as_tensor(prompt.token_ids, dtype=torch.int64)
        token_ids[row, : len(ids)] = ids
        begin, end = max(0, prompt.prompt_len - dense.tail_tokens), prompt.prompt_len
        is_tail[row, begin : end + dense.full_decode_tokens] = True
        skipped = prompt.prefix_len if skip_prefix else 0
        looked_at = torch.arange(prompt.prompt_len + skipped - 1, len(ids) - 1)
        if answer_tokens is not None and len(looked_at) > answer_tokens:
            looked_at = looked_at[torch.arange(answer_tokens) * len(looked_at) // answer_tokens]
        rows.append(torch.full_like(looked_at, row))
        positions.append(looked_at)
        tokens.append(ids[looked_at + 1])
    return MicroBatch(
        indices=indices,
        tasks=[prompt.task for prompt in prompts],
        token_ids=token_ids,
        is_tail=is_tail,
        probe=collate_probes([p.token_ids[: p.prompt_len] for p in prompts], inputs),
        answer_rows=torch.cat(rows),
        answer_positions=torch.cat(positions),
        answer_tokens=torch.cat(tokens),
    )
