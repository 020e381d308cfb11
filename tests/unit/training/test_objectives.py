"""Oracles: the formulas of arXiv 2604.07394 and of a budget's multiplier, by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from training.config import LossSettings
from training.distributed import World
from training.objectives import (
    Objective,
    QualityBudget,
    ShareTargets,
    make_objective,
    targets_by_task,
)

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
TASKS = ("needle", "repeat_end", "needle", "few_shot", "repeat_end")
MIX = ("needle", "repeat_end", "few_shot", "arithmetic")


class Notes:
    """A World of two processes that keeps what this one gives to the other."""

    size = 2

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.given.append(tensor.clone())
        return tensor


class Beside:
    """A World of two processes that adds what the other gave."""

    size = 2

    def __init__(self, others: list[torch.Tensor]) -> None:
        self.others = iter(others)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(next(self.others))


def targets(**more: Any) -> ShareTargets:
    settings = LossSettings(
        objective="paper", targets=("needle=0.5", "repeat_end=0.9", "few_shot=0.7"), **more
    )
    return ShareTargets(MIX, settings, CPU)


def by_hand(logits: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """Add up l1 |t - s| + l2 (t - s)^2 over needle, repeat_end and few_shot."""
    total = torch.zeros(())
    tasks = (("needle", 0.5), ("repeat_end", 0.9), ("few_shot", 0.7))
    for (task, target), linear, quadratic in zip(tasks, *multipliers[:, :3], strict=True):
        rows = [row for row, name in enumerate(TASKS) if name == task]
        chosen = logits[:, rows]
        share = (chosen[..., 0].exp() / chosen.exp().sum(dim=-1)).mean()
        total = total + linear * (target - share).abs() + quadratic * (target - share) ** 2
    return total


def test_multiplier_rises_beyond_the_budget_and_falls_within() -> None:
    budget = QualityBudget(LossSettings(budget_nats=0.1, multiplier_rate=0.05))
    first = budget.weight
    budget.ascend(0.1)
    assert budget.weight == first
    budget.ascend(0.15)
    assert budget.weight == pytest.approx(first * math.exp(0.05 * 0.5))
    raised = budget.weight
    budget.ascend(0.02)
    assert budget.weight == pytest.approx(raised * math.exp(-0.05 * 0.8))


def test_multiplier_is_bounded() -> None:
    budget = QualityBudget(LossSettings(budget_nats=0.1, multiplier_rate=0.05))
    first = budget.weight
    budget.ascend(1000.0)  # one lost needle moves it no further than four budgets
    assert budget.weight == pytest.approx(first * math.exp(0.05 * 3))
    for _ in range(400):
        budget.ascend(1000.0)
    assert budget.weight == 1000
    for _ in range(1000):
        budget.ascend(0.0)
    assert budget.weight == 1 / 1000


def test_budget_is_kept_in_the_end() -> None:
    """Descent on layers whose absence costs c s^2 nats, where a share s of them is SPARSE."""
    cost, nats = 2.0, 0.18
    budget = QualityBudget(LossSettings(budget_nats=nats, multiplier_rate=0.02))
    logits = torch.tensor([[[0.0, 2.0]]], requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(500):
        divergence = cost * logits.softmax(dim=-1)[0, 0, 0] ** 2
        loss = budget.weight * divergence + budget.of_routes(logits, ["needle"], 1, ALONE)
        logits.grad = torch.autograd.grad(loss, logits)[0]
        torch.nn.utils.clip_grad_norm_([logits], 0.05)
        optimizer.step()
        budget.ascend(divergence.item())
    assert logits.softmax(dim=-1)[0, 0, 0].item() == pytest.approx((nats / cost) ** 0.5, rel=0.03)
    # There the two terms pull equally: weight * 2 c s = 1.
    assert budget.weight == pytest.approx(1 / (2 * (cost * nats) ** 0.5), rel=0.03)


def test_budget_presses_on_all_layers_and_prompts_alike() -> None:
    budget = QualityBudget(LossSettings())
    logits = torch.randn(4, 5, 2, requires_grad=True)
    part = budget.of_routes(logits, TASKS, 20, ALONE)
    full = logits[..., 1].exp() / logits.exp().sum(dim=-1)
    assert part.item() == pytest.approx(full.sum().item() / 4 / 20)
    found = torch.autograd.grad(part, logits)[0]
    slope = full * (1 - full) / (4 * 20)
    torch.testing.assert_close(found, torch.stack([-slope, slope], dim=-1))
    equal = torch.zeros(4, 5, 2, requires_grad=True)
    slopes = torch.autograd.grad(budget.of_routes(equal, TASKS, 20, ALONE), equal)[0]
    assert (slopes[..., 1] > 0).all()  # descent lowers the FULL logit
    assert slopes.unique().numel() == 2


def test_budget_compares_answers_with_full_attentions() -> None:
    budget = QualityBudget(LossSettings())
    assert budget.compares
    logits, teacher = torch.randn(2, 6, 9)
    p, q = teacher.softmax(dim=-1), logits.softmax(dim=-1)
    found = budget.by_token(logits, teacher, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(found, (p * (p / q).log()).sum(dim=-1))


def test_budget_says_the_share_of_sparse_layers() -> None:
    budget = QualityBudget(LossSettings())
    logits = torch.randn(4, 5, 2)
    budget.of_routes(logits, TASKS, 5, ALONE)
    share = logits.softmax(dim=-1)[..., 0].mean().item()
    assert budget.describe() == {
        "shares": {"all": pytest.approx(share, abs=1e-4)},
        "multiplier": budget.weight,
    }


def test_targets_are_pressed_for_as_the_paper_says() -> None:
    objective = targets(multiplier_rate=0.1)
    objective.multipliers.copy_(torch.rand(2, 4))
    logits = torch.randn(4, 5, 2, requires_grad=True)
    found = objective.of_routes(logits, TASKS, 5, ALONE)
    expected = by_hand(logits, objective.multipliers)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_targets_multipliers_ascend_by_the_gap() -> None:
    objective = targets(multiplier_rate=0.1)
    logits = torch.randn(4, 5, 2)
    share = {
        name: logits.softmax(dim=-1)[:, [task == name for task in TASKS], 0].mean().item()
        for name in MIX[:3]
    }
    gaps = [0.5 - share["needle"], 0.9 - share["repeat_end"], 0.7 - share["few_shot"], 0.0]
    for times in (1, 2):
        objective.of_routes(logits, TASKS, 5, ALONE)
        objective.ascend(12.0)
        expected = torch.tensor([[abs(gap) for gap in gaps], [gap**2 for gap in gaps]])
        torch.testing.assert_close(objective.multipliers, 0.1 * times * expected)
    said = objective.describe()["shares"]
    assert said == pytest.approx(share | {"arithmetic": said["arithmetic"]}, abs=1e-4)


def test_targets_weigh_the_answers_surprise() -> None:
    objective = targets()
    assert (objective.compares, objective.weight) == (False, 1.0)
    logits, tokens = torch.randn(6, 9), torch.arange(6)
    found = objective.by_token(logits, None, tokens)
    torch.testing.assert_close(found, -logits.log_softmax(dim=-1)[tokens, tokens])


def test_descent_reaches_the_targets() -> None:
    objective = targets(multiplier_rate=0.05)
    logits = torch.tensor([[[0.0, 2.0]] * 5], requires_grad=True)
    for _ in range(300):
        loss = objective.of_routes(logits, TASKS, 5, ALONE)
        loss = loss + 0.2 * logits.softmax(dim=-1)[..., 0].mean()  # a cost to SPARSE
        logits.data -= 0.2 * torch.autograd.grad(loss, logits)[0]
        objective.ascend(0.0)
    for task, target in (("needle", 0.5), ("repeat_end", 0.9), ("few_shot", 0.7)):
        rows = [name == task for name in TASKS]
        assert logits.softmax(dim=-1)[0, rows, 0].mean().item() == pytest.approx(target, abs=0.03)


MAKERS: dict[str, Callable[[], Objective]] = {
    "budget": lambda: QualityBudget(LossSettings()),
    "paper": targets,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_two_processes_give_the_gradient_of_one(make: Callable[[], Objective]) -> None:
    logits = torch.randn(4, 5, 2, requires_grad=True)
    parts = [[0, 1], [2, 3, 4]]  # the needles in both, few_shot in one alone

    def start() -> Objective:
        objective = make()
        if isinstance(objective, ShareTargets):
            objective.multipliers.copy_(torch.tensor([[0.5] * 4, [0.8] * 4]))
        return objective

    def part(objective: Objective, rows: list[int], world: Any) -> torch.Tensor:
        return objective.of_routes(logits[:, rows], [TASKS[row] for row in rows], 5, world)

    single = start()
    whole = single.of_routes(logits, TASKS, 5, ALONE)
    expected = torch.autograd.grad(whole, logits)[0]
    notes = [Notes(), Notes()]
    for rows, note in zip(parts, notes, strict=True):
        part(start(), rows, note)
    values, gradient = [], torch.zeros_like(logits)
    single.ascend(0.03)
    for rows, other in zip(parts, reversed(notes), strict=True):
        objective = start()
        value = part(objective, rows, Beside(other.given))
        gradient += torch.autograd.grad(value, logits)[0]
        values.append(value.item())
        objective.ascend(0.03)
        assert objective.describe() == single.describe()
        for name, state in objective.state_dict().items():
            torch.testing.assert_close(state, single.state_dict()[name])
    torch.testing.assert_close(gradient, expected)
    assert sum(values) == pytest.approx(whole.item())  # the trainer adds them up


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_state_is_taken_up(make: Callable[[], Objective]) -> None:
    one, other = make(), make()
    one.of_routes(torch.randn(4, 5, 2), TASKS, 5, ALONE)
    one.ascend(0.3)
    assert str(one.state_dict()) != str(other.state_dict())
    other.load_state_dict(one.state_dict())
    assert str(one.state_dict()) == str(other.state_dict())


def test_settings_name_the_objective() -> None:
    assert isinstance(make_objective(LossSettings(), MIX, CPU), QualityBudget)
    paper = LossSettings(objective="paper")
    assert isinstance(make_objective(paper, MIX, CPU), ShareTargets)


@pytest.mark.parametrize("nats", [0.0, -0.1])
def test_a_budget_of_nothing_is_refused(nats: float) -> None:
    with pytest.raises(ValueError, match=r"loss\.budget_nats to be above 0"):
        LossSettings(budget_nats=nats)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_budget_of_more_than_is_at_stake_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"loss\.budget_share to be above 0 and at most 1"):
        LossSettings(budget_share=share)


def test_targets_by_task_resolves_names_and_groups() -> None:
    settings = LossSettings(targets=("local=0.9", "needle=0.3"))
    found = targets_by_task(["needle", "multi_key", "repeat_end", "mine"], settings)
    assert found == {"needle": 0.3, "multi_key": 0.6, "repeat_end": 0.9, "mine": 0.6}


@pytest.mark.parametrize("entry", ["nothing=0.5", "needle=2", "needle=x", "needle"])
def test_targets_by_task_refuses_other_entries(entry: str) -> None:
    with pytest.raises(ValueError, match=r"loss\.targets"):
        targets_by_task(["needle"], LossSettings(targets=(entry,)))
