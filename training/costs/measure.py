"""Measure what SPARSE layers cost a prompt: the divergence of sampled routes, and its slopes.

Each prompt runs under full attention and all SPARSE, and a share of them, half by default, once
more under sampled routes, with gradients, which takes as long as the other two. The samples lean to
what is worth trying: layers that have mattered so far stay FULL more often. Nothing here depends on
a router, so that any number of them is fitted afterwards.

Dimension legend: L layers, B prompts, P pools, H head dim, K samples, at most 2.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from flux_vllm.router.inputs import RouterInputs
from training.attach import RoutedModel
from training.costs.measurements import Measurements, join
from training.data.batching import DenseQueries, MicroBatch, collate, group_by_length
from training.data.encoding import Encoded
from training.losses import distillation, mean_by_prompt

_AT_ONCE = 48
"""Prompts to a file; they are sorted by length before they are padded."""
_MEAN_SHIFT, _SHIFT_DEVIATION = -0.7, 1.5
"""Of all layers' leads in a sample: shares of SPARSE from 0.2 to 1, 0.6 in the middle."""
_LARGEST_LEAD = 3.0
_LEAST_NATS = 0.02


class Measurer:
    """Measures prompts on one device.

    Args:
        routed: the model.
        inputs: whose pools are kept; context layers play no part.
        answer_tokens: most answer tokens of a prompt to compare, evenly spaced.
        dense: queries that SPARSE shows everything.
        token_budget: tokens computed at once.
        seed: of the samples.
        sampled_share: of the prompts, by micro-batches; routes are sampled for these alone.
    """

    def __init__(
        self,
        routed: RoutedModel,
        inputs: RouterInputs,
        answer_tokens: int,
        dense: DenseQueries,
        token_budget: int,
        seed: int,
        sampled_share: float = 1.0,
    ) -> None:
        self.routed = routed
        self.inputs = RouterInputs(pools=inputs.pools, probe=inputs.probe)
        self.answer_tokens = answer_tokens
        self.dense = dense
        self.token_budget = token_budget
        self.generator = torch.Generator().manual_seed(seed)
        self.leads = torch.zeros(routed.num_layers)
        self.sampled_share = sampled_share
        self.due = 1.0  # the first is sampled: later samples lean on it

    def measure(
        self, prompts: Sequence[Encoded], places: np.ndarray, held_out: np.ndarray
    ) -> Measurements:
        """Measure some prompts.

        Args:
            prompts: longer than SPARSE's sinks and window.
            places: of the prompts in their files.
            held_out: which are not to be fitted to.
        """
        parts = []
        for rows in group_by_length([len(prompt) for prompt in prompts], self.token_budget):
            micro = collate(
                [prompts[row] for row in rows],
                rows,
                self.inputs,
                self.answer_tokens,
                dense=self.dense,
            )
            is_sampled = self.due >= 1
            self.due += self.sampled_share - is_sampled
            pooled, sparse, nats, slopes = self._run(micro.to(self.routed.device), is_sampled)
            if not (np.isfinite(nats).all() and np.isfinite(slopes[:, 1:]).all()):
                raise ValueError(
                    f"expected finite divergences and slopes, found others among the prompts "
                    f"{sorted(places[rows].tolist())} of the files; measure with --system.dtype "
                    "float32, or leave these prompts out"
                )
            tokens = np.array([prompts[row].prompt_len for row in rows])
            parts.append(
                Measurements(pooled, sparse, nats, slopes, tokens, places[rows], held_out[rows])
            )
        return join(parts)

    def _run(
        self, micro: MicroBatch, is_sampled: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Give pooled [B, L, P, H], sparse [B, K, L], nats [B, K] and slopes [B, K, L].

        K is 1 without a sample.
        """
        layers, count = self.routed.num_layers, len(micro.tasks)
        at = (micro.answer_rows, micro.answer_positions)
        pooled = self.routed.probe(micro.probe, self.inputs)
        pooled = pooled.unflatten(-1, (len(self.inputs.pools), -1)).transpose(0, 1)
        with torch.no_grad():
            full = torch.ones(layers, count, device=self.routed.device)
            teacher = self.routed.logits(self.routed.forward(micro.token_ids, full)[at])

        def nats(routes: torch.Tensor) -> torch.Tensor:
            hidden = self.routed.forward(micro.token_ids, routes, micro.is_tail)
            by_token = distillation(self.routed.logits(hidden[at]), teacher)
            return mean_by_prompt(by_token, micro.answer_rows, count)

        routes = [torch.zeros_like(full)]
        with torch.no_grad():
            costs = [nats(routes[0])]
        slopes = [torch.full_like(full, torch.nan)]
        if is_sampled:
            routes.append(self._sample(count).to(full.device).requires_grad_(True))
            costs.append(nats(routes[1]))
            slopes.append(-torch.autograd.grad(costs[1].sum(), routes[1])[0])
        sparse = 1 - torch.stack(routes).detach()  # [K, L, B]
        return (
            pooled.half().cpu().numpy(),
            sparse.permute(2, 0, 1).to(torch.uint8).cpu().numpy(),
            torch.stack(costs, dim=1).detach().cpu().numpy(),
            torch.stack(slopes).permute(2, 0, 1).float().cpu().numpy(),
        )

    def _sample(self, count: int) -> torch.Tensor:
        """Draw routes [L, B], 1 for FULL."""
        uniform = torch.rand(len(self.leads), count, generator=self.generator)
        noise = torch.logit(uniform, eps=1e-4)
        shift = torch.randn(count, generator=self.generator) * _SHIFT_DEVIATION + _MEAN_SHIFT
        return (self.leads[:, None] + noise + shift > 0).float()

    def lean(self, measured: Measurements) -> None:
        """Let later samples keep the layers FULL that have mattered so far."""
        self.leads = leads(measured)


def leads(measured: Measurements) -> torch.Tensor:
    """Say how much each layer matters beside the others: [L], the median layer's is 0."""
    relative = measured.slopes / (measured.nats[..., None] + _LEAST_NATS)
    worth = np.nanmean(relative.clip(0), axis=(0, 1))
    lead = np.log(worth + 1e-6) - np.log(np.median(worth) + 1e-6)
    return torch.from_numpy(lead.clip(-_LARGEST_LEAD, _LARGEST_LEAD)).float()


class PlacedPrompt(NamedTuple):
    """A prompt to measure."""

    place: int
    """In its files."""
    held_out: bool
    """Not to be fitted to."""
    prompt: Encoded
    """Longer than sinks and window."""


def measure_into(
    folder: Path,
    measurer: Measurer,
    prompts: Sequence[PlacedPrompt],
    known: Sequence[Measurements],
    time_limit_s: float,
    rank: int = 0,
) -> None:
    """Measure prompts file by file; what a killed run has written stands.

    Args:
        folder: for the files.
        measurer: measures.
        prompts: those that are not known yet.
        known: what the folder holds.
        time_limit_s: begin no further file after this; 0: no limit.
        rank: of this process, for its files' names.
    """
    began = time.monotonic()
    found = list(known)
    for start in range(0, len(prompts), _AT_ONCE):
        if time_limit_s and time.monotonic() - began > time_limit_s:
            break
        if found:
            measurer.lean(join(found))
        chunk = prompts[start : start + _AT_ONCE]
        part = measurer.measure(
            [one.prompt for one in chunk],
            np.array([one.place for one in chunk]),
            np.array([one.held_out for one in chunk]),
        )
        part.save(folder / f"{rank:03d}-{min(part.place):08d}-{len(part)}.npz")
        found.append(part)
        sys.stderr.write(
            f"[{time.monotonic() - began:.0f} s] {start + len(chunk)} of {len(prompts)} prompts "
            f"measured; all SPARSE costs {part.nats[:, 0].mean():.3f} nats, {_samples_cost(part)}\n"
        )


def _samples_cost(measured: Measurements) -> str:
    """Say what sampled routes cost, over the prompts that have a sample."""
    nats = measured.nats[:, 1:]
    sampled = nats[np.isfinite(nats)]
    return f"samples {sampled.mean():.3f}" if sampled.size else "no samples"
