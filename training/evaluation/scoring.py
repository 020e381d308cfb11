"""Run a policy over prompts and score every answer.

An open prompt's routes come from the prompt alone; the answer's prefix is decoded by force under
them, and only the tokens after it are scored.

Teacher forcing suffices: a greedy decoder gives the expected answer exactly when every answer
token is the most likely one after the answer's earlier tokens.

Dimension legend: P prompts, L layers, B prompts of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flux_vllm.patterns.base import SparsePattern
from flux_vllm.router.inputs import RouterInputs
from training.attach import RoutedModel
from training.data.batching import MicroBatch, collate, group_by_length
from training.data.encoding import Encoded
from training.data.families import FAMILIES
from training.distributed import World
from training.losses import cross_entropy, mean_by_prompt
from training.pattern_attention import PromptAttention, make_pattern_attention
from training.policies import Policy

_LOGITS_AT_ONCE = 16384


@dataclass(frozen=True, slots=True)
class Scores:
    """Results by prompt, in the order of the prompts."""

    score: np.ndarray
    """[P] float32 in [0, 1], by the task's metric."""
    surprise: np.ndarray
    """[P] float32, nats an answer token."""
    sparse: np.ndarray
    """[P, L] float32, 1 where the layer's final route is SPARSE."""
    density: np.ndarray
    """[P] float32: of the pairs of a prompt's query and a key up to it, the share attended in a
    SPARSE layer; NaN for a prompt without one."""


class Scorer:
    """Scores policies on one device, or on all processes' devices together.

    Args:
        routed: the model.
        pattern: what SPARSE means in a prompt, of the model's sinks and window.
        inputs: of the router.
        token_budget: tokens computed at once.
        world: this process among the others.

    Raises: ValueError: a pattern of other sizes than the model's.
    """

    def __init__(
        self,
        routed: RoutedModel,
        pattern: SparsePattern,
        inputs: RouterInputs,
        token_budget: int,
        world: World,
    ) -> None:
        sizes = (routed.sink_tokens, routed.window_tokens)
        if (pattern.sink_tokens, pattern.window_tokens) != sizes:
            raise ValueError(
                f"expected a pattern of the model's sink and window {sizes}, found {pattern}; make "
                "it of these"
            )
        self.routed = routed
        self.pattern = pattern
        self.inputs = inputs
        self.token_budget = token_budget
        self.world = world
        self.tokens = 0
        self._attend = make_pattern_attention(
            pattern, routed.sparse_attention, routed.sparse_kernel
        )

    def score(self, prompts: Sequence[Encoded], policy: Policy) -> Scores:
        """Score a policy.

        Args:
            prompts: P of them, the same in every process.
            policy: chooses the routes.

        Returns: Scores of all prompts, in every process.
        """
        groups = list(group_by_length([len(prompt) for prompt in prompts], self.token_budget))
        layers = self.routed.num_layers
        result = torch.zeros(len(prompts), 3 + layers, device=self.world.device)
        for rows in groups[self.world.rank :: self.world.size]:
            chosen = [prompts[row] for row in rows]
            micro = collate(chosen, rows, self.inputs, skip_prefix=True).to(self.world.device)
            ends = [[prompt.prompt_len] for prompt in chosen]
            attention = PromptAttention(self._attend, ends, self.world.device)
            result[rows] = self._run(micro, policy, attention)
            self.tokens += micro.token_ids.numel()
        table = self.world.sum(result).cpu().numpy()
        return Scores(table[:, 0], table[:, 1], table[:, 3:], table[:, 2])

    @torch.inference_mode()
    def _run(self, micro: MicroBatch, policy: Policy, attention: PromptAttention) -> torch.Tensor:
        """Score one micro-batch: [B, 3 + L] of score, surprise, density, SPARSE by layer."""
        routes = policy.decide(self.routed.probe(micro.probe, self.inputs))
        states = self.routed.forward(micro.token_ids, routes, sparse=attention)
        hidden = states[micro.answer_rows, micro.answer_positions]
        count = len(micro.tasks)
        right, surprise = [], []
        parts = (hidden.split(_LOGITS_AT_ONCE), micro.answer_tokens.split(_LOGITS_AT_ONCE))
        for part, tokens in zip(*parts, strict=True):
            logits = self.routed.logits(part)
            right.append((logits.argmax(dim=-1) == tokens).float())
            surprise.append(cross_entropy(logits, tokens))
        share = mean_by_prompt(torch.cat(right), micro.answer_rows, count)
        exact = torch.tensor([metric_of(task) == "exact" for task in micro.tasks])
        score = torch.where(exact.to(share.device), (share > 1 - 1e-6).float(), share)
        by_prompt = mean_by_prompt(torch.cat(surprise), micro.answer_rows, count)
        columns = torch.stack([score, by_prompt, attention.density()], dim=1)
        return torch.cat([columns, 1 - routes.T], dim=1)


def metric_of(task: str) -> str:
    """Return a task's metric; tasks from files are scored by token."""
    return FAMILIES[task].metric if task in FAMILIES else "tokens"


def group_of(task: str) -> str:
    """Return a task's group; tasks from files form their own."""
    return FAMILIES[task].group if task in FAMILIES else "file"
