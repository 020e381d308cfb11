"""What training minimises: FULL layers within a budget of divergence, or the paper's form.

Dimension legend: A answer tokens of all prompts, B prompts, L layers, V vocabulary, K tasks.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from flux_vllm.router.route import Route
from training.config import LossSettings
from training.data.families import FAMILIES
from training.distributed import World
from training.losses import cross_entropy, distillation

_FIRST_MULTIPLIER = 30.0
_MOST_MULTIPLIER = 1000.0
_MOST_EXCESS = 3.0
_FILE_TARGET = 0.6
"""Target of tasks that come from files and name none."""


class Objective(Protocol):
    """One way to weigh answers against FULL layers."""

    compares: bool
    """Whether answers are compared with full attention's, whose logits are then needed."""
    weight: float
    """Of the answers' loss."""

    def by_token(
        self, logits: torch.Tensor, teacher: torch.Tensor | None, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Give the answers' loss by token: two [A, V] float32 and [A] to [A], nats."""
        ...

    def of_routes(
        self, router_logits: torch.Tensor, tasks: Sequence[str], batch_size: int, world: World
    ) -> torch.Tensor:
        """Give this process's part of the loss on routes, a scalar.

        Args:
            router_logits: [L, B, 2] of this process's prompts.
            tasks: [B] their names.
            batch_size: prompts of the step, in all processes.
            world: this process among the others.
        """
        ...

    def ascend(self, answers_loss: float) -> None:
        """Take one step of gradient ascent on the multipliers, given the step's mean answer."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a step's row of the log says."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        ...


class QualityBudget:
    """The fewest FULL layers whose mean divergence from full attention stays within a budget.

    Minimises multiplier * divergence + share of FULL layers. The multiplier is an exchange rate: a
    layer stays FULL for a prompt where that saves more than 1 / (L * multiplier) nats a token of
    its answer. Ascent on its logarithm raises it while the divergence is beyond the budget and
    lowers it while it is within. So each prompt gets the layers it needs, and no task is named.

    Args:
        settings: budget and rate.
    """

    compares = True

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings
        self.weight = _FIRST_MULTIPLIER
        self._share = float("nan")

    def by_token(
        self, logits: torch.Tensor, teacher: torch.Tensor | None, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Give the divergence from full attention."""
        assert teacher is not None
        return distillation(logits, teacher)

    def of_routes(
        self,
        router_logits: torch.Tensor,
        tasks: Sequence[str],
        batch_size: int,
        world: World,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Give the share of FULL layers; weights [B], of mean 1: what each prompt counts."""
        shares = router_logits.softmax(dim=-1)[..., Route.FULL].mean(dim=0)
        share = (shares if weights is None else shares * weights).sum() / batch_size
        self._share = 1 - float(world.sum(share.detach().clone()))
        return share

    def ascend(self, answers_loss: float) -> None:
        """Raise the multiplier beyond the budget, lower it within."""
        # Bounded: one lost needle is many times the budget.
        excess = min(answers_loss / self.settings.budget_nats - 1, _MOST_EXCESS)
        weight = self.weight * math.exp(self.settings.multiplier_rate * excess)
        self.weight = min(max(weight, 1 / _MOST_MULTIPLIER), _MOST_MULTIPLIER)

    def describe(self) -> dict[str, Any]:
        """Return the mean P(SPARSE) and the multiplier."""
        return {"shares": {"all": round(self._share, 4)}, "multiplier": round(self.weight, 4)}

    def state_dict(self) -> dict[str, Any]:
        """Return the multiplier."""
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the multiplier."""
        self.weight = state["weight"]


class ShareTargets:
    """The paper's form: likely answers, and a share of SPARSE layers for each task.

    Adds l1 |target - s| + l2 (target - s)^2 a task, where s is the mean P(SPARSE) of its prompts;
    both multipliers are learned by gradient ascent.

    Args:
        tasks: of the mix.
        settings: targets and rate.
        device: where the shares are computed.

    Raises: ValueError: a target that names nothing in the mix.
    Source: arXiv 2604.07394.
    """

    compares = False
    weight = 1.0

    def __init__(self, tasks: Sequence[str], settings: LossSettings, device: torch.device) -> None:
        targets = targets_by_task(tasks, settings)
        self.names = list(targets)
        self.rate = settings.multiplier_rate
        self.target = torch.tensor(list(targets.values()), device=device)
        self.multipliers = torch.zeros(2, len(targets), device=device)
        self._gap = torch.zeros_like(self.target)

    def by_token(
        self, logits: torch.Tensor, teacher: torch.Tensor | None, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Give the answers' surprise."""
        return cross_entropy(logits, tokens)

    def of_routes(
        self, router_logits: torch.Tensor, tasks: Sequence[str], batch_size: int, world: World
    ) -> torch.Tensor:
        """Give the constraints' loss, zero for tasks without a prompt in the step."""
        sparse = router_logits.softmax(dim=-1)[..., Route.SPARSE].mean(dim=0)
        task = torch.tensor([self.names.index(name) for name in tasks], device=sparse.device)
        own = sparse.new_zeros(len(self.names)).index_add(0, task, sparse)
        count = world.sum(torch.bincount(task, minlength=len(self.names)).to(sparse.dtype))
        # Other processes' prompts count, but their gradients are their own.
        others = world.sum(own.detach().clone()) - own.detach()
        gap = self.target - (own + others) / count.clamp(min=1)
        gap = torch.where(count > 0, gap, 0.0)
        self._gap = gap.detach()
        linear, quadratic = self.multipliers
        loss = (linear * gap.abs() + quadratic * gap**2).sum()
        # The value is shared out; the gradient is that of this process's own prompts already.
        return loss - loss.detach() * (1 - 1 / world.size)

    def ascend(self, answers_loss: float) -> None:
        """Raise the multipliers of tasks that miss their targets."""
        self.multipliers += self.rate * torch.stack([self._gap.abs(), self._gap**2])

    def describe(self) -> dict[str, Any]:
        """Return each task's mean P(SPARSE) (its target where the step had none of it)."""
        shares = zip(self.names, (self.target - self._gap).tolist(), strict=True)
        return {"shares": {name: round(share, 4) for name, share in shares}}

    def state_dict(self) -> dict[str, Any]:
        """Return the multipliers."""
        return {"multipliers": self.multipliers.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the multipliers."""
        self.multipliers.copy_(state["multipliers"])


def make_objective(settings: LossSettings, tasks: Sequence[str], device: torch.device) -> Objective:
    """Make the objective that the settings name."""
    if settings.objective == "paper":
        return ShareTargets(tasks, settings, device)
    return QualityBudget(settings)


def targets_by_task(tasks: Sequence[str], settings: LossSettings) -> dict[str, float]:
    """Resolve the target share of each task.

    Raises: ValueError: an entry that is not NAME=SHARE, or names nothing in the mix.
    """
    groups = {name: FAMILIES[name].group for name in tasks if name in FAMILIES}
    targets = {
        name: FAMILIES[name].target_share if name in FAMILIES else _FILE_TARGET for name in tasks
    }
    for entry in settings.targets:
        name, _, share = entry.partition("=")
        named = [task for task in targets if name in (task, groups.get(task))]
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not named or not 0 <= value <= 1:
            raise ValueError(
                "expected loss.targets as NAME=SHARE with a task or group of the mix "
                f"({sorted({*targets, *groups.values()})}) and a share in [0, 1], found {entry!r}"
            )
        targets.update(dict.fromkeys(named, value))
    return targets
