"""What training minimises: likeness to full attention, answers, and the share constraint.

Dimension legend: A answer tokens of all prompts, B prompts, V vocabulary, K constraints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from training.config import LossSettings
from training.data.families import FAMILIES

EARLY_CHUNKS = "early_chunks"
"""The constraint on chunks before a prompt's last, which cannot know the task yet."""
_EARLY_TARGET = 0.8
_FILE_TARGET = 0.6
"""Target of tasks that come from files and name none."""


def distillation(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Give KL(teacher || student) by token: two [A, V] float32 to [A], nats."""
    student = functional.log_softmax(student_logits, dim=-1)
    teacher = functional.log_softmax(teacher_logits, dim=-1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Give the answer's surprise by token: [A, V] and [A] to [A], nats."""
    return functional.cross_entropy(logits, targets, reduction="none")


def mean_by_prompt(
    token_losses: torch.Tensor, prompt_of_token: torch.Tensor, prompts: int
) -> torch.Tensor:
    """Average token losses within each prompt: [A], [A] int64 to [B].

    A short answer then counts as much as a long one.
    """
    sums = token_losses.new_zeros(prompts).index_add(0, prompt_of_token, token_losses)
    counts = torch.bincount(prompt_of_token, minlength=prompts).clamp(min=1)
    return sums / counts


def excess_confidence(router_logits: torch.Tensor, bound: float) -> torch.Tensor:
    """Give the squared excess of the logits' lead over a bound: [L, R, 2] to a mean over R."""
    lead = router_logits[..., 1] - router_logits[..., 0]
    return torch.relu(lead.abs() - bound).square().sum(dim=0).mean()


def share_spread(
    shares: torch.Tensor, constraint_of_prompt: torch.Tensor, found: "Shares"
) -> torch.Tensor:
    """Give the variance of shares within each task, summed over tasks.

    Args:
        shares: [R] float32, by prompt.
        constraint_of_prompt: [R] int64.
        found: means and counts of these.

    Returns: a scalar.
    """
    away = shares - found.mean.detach()[constraint_of_prompt]
    return (away.square() / found.count[constraint_of_prompt].clamp(min=1)).sum()


def targets_by_task(tasks: Sequence[str], settings: LossSettings) -> dict[str, float]:
    """Resolve the target share of each task, and of early chunks.

    Raises: ValueError: an entry that is not NAME=SHARE, or names nothing in the mix.
    """
    groups = {name: FAMILIES[name].group for name in tasks if name in FAMILIES}
    targets = {
        name: FAMILIES[name].target_share if name in FAMILIES else _FILE_TARGET for name in tasks
    }
    targets[EARLY_CHUNKS] = _EARLY_TARGET
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


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of SPARSE layers, over all processes and the steps that the constraint sees."""

    mean: torch.Tensor
    """[K] float32, mean P(SPARSE); meaningless where the count is 0."""
    count: torch.Tensor
    """[K] float32 prompts (or early chunks)."""


class ShareConstraints:
    """One constraint a task: the mean share of SPARSE layers equals the task's target.

    Args:
        targets: of `targets_by_task`.
        settings: form and rate.
        device: where the shares are computed.

    Source: arXiv 2604.07394 for `absolute`; `lagrangian` is the method of multipliers, whose
    multiplier can fall as well as rise, so that it neither dies nor overshoots for good.
    """

    def __init__(
        self, targets: dict[str, float], settings: LossSettings, device: torch.device
    ) -> None:
        self.names = list(targets)
        self.settings = settings
        self.final_target = torch.tensor(list(targets.values()), device=device)
        self.target = self.final_target
        # Rows: the linear and the quadratic multiplier (the latter learned for `absolute` only).
        self.multipliers = torch.zeros(2, len(targets), device=device)

    def advance(self, progress: float) -> None:
        """Raise the targets as far as `progress`, the share of the run that is done, says."""
        ramp = self.settings.target_ramp
        self.target = self.final_target * (min(1.0, progress / ramp) if ramp > 0 else 1.0)

    def loss(self, shares: Shares) -> torch.Tensor:
        """Give each constraint's loss [K], zero where the step has none of its prompts."""
        gap = self.target - shares.mean
        linear, quadratic = self.multipliers
        if self.settings.constraint == "absolute":
            losses = linear * gap.abs() + quadratic * gap**2
        else:
            losses = linear * gap + 0.5 * self.settings.penalty * gap**2
        return torch.where(shares.count > 0, losses, 0.0)

    def ascend(self, shares: Shares) -> None:
        """Take one step of gradient ascent on the multipliers."""
        gap = torch.where(shares.count > 0, self.target - shares.mean.detach(), 0.0)
        linear = gap.abs() if self.settings.constraint == "absolute" else gap
        self.multipliers += self.settings.multiplier_rate * torch.stack([linear, gap**2])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs."""
        return {"multipliers": self.multipliers.cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up where `state_dict` left off."""
        self.multipliers.copy_(state["multipliers"])
