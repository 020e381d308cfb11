"""Probes of a batch: what the routers look at, as the server's probe sees it.

Dimension legend: B prompts, P pools, T tokens of a probe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from flux_vllm.router.inputs import RouterInputs


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """The two ends of B prompts, padded at their end."""

    token_ids: torch.Tensor
    """[B, T] int64."""
    positions: torch.Tensor
    """[B, T] int64: of the prompt."""
    weights: torch.Tensor
    """[B, P, T] float32: what each token counts in each pool."""
    told: torch.Tensor
    """[B, P, WIDTH] float32: what is told of each prompt (`RouterInputs.told`)."""

    def to(self, device: torch.device) -> "ProbeBatch":
        """Copy to a device."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return ProbeBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))

    def split(self, rows: int) -> list["ProbeBatch"]:
        """Cut it into batches of at most so many prompts."""
        columns = [getattr(self, field.name).split(rows) for field in fields(self)]
        return [ProbeBatch(*part) for part in zip(*columns, strict=True)]


def collate_probes(prompts: Sequence[np.ndarray], inputs: RouterInputs) -> ProbeBatch:
    """Cut the probes out of prompts.

    Args:
        prompts: token ids of each prompt, [tokens] int, without its answer.
        inputs: of the routers.

    Returns: ProbeBatch, on the CPU.
    """
    token_ids = torch.zeros(len(prompts), inputs.probe.tokens, dtype=torch.int64)
    positions = torch.zeros_like(token_ids)
    for row, ids in enumerate(prompts):
        at = inputs.probe.positions(len(ids))
        token_ids[row, : len(at)] = torch.as_tensor(np.asarray(ids)[at], dtype=torch.int64)
        positions[row, : len(at)] = torch.as_tensor(at)
    weights = np.stack([inputs.weights(len(ids)) for ids in prompts])
    told = np.stack([inputs.told(ids) for ids in prompts])
    return ProbeBatch(token_ids, positions, torch.from_numpy(weights), torch.from_numpy(told))
