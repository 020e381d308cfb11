"""Oracles: the formulas of DESIGN.md, section 1, by hand."""

import pytest
import torch

from training.config import LossSettings
from training.losses import (
    ShareConstraints,
    Shares,
    distillation,
    excess_confidence,
    mean_by_prompt,
    share_spread,
    targets_by_task,
)


def shares(*means: float) -> Shares:
    return Shares(torch.tensor(means), torch.ones(len(means)))


def test_distillation_is_zero_for_equal_logits_and_kl_otherwise() -> None:
    student, teacher = torch.randn(2, 7, 11)
    assert distillation(teacher, teacher).abs().max() < 1e-6
    p, q = teacher.softmax(dim=-1), student.softmax(dim=-1)
    expected = (p * (p.log() - q.log())).sum(dim=-1)
    torch.testing.assert_close(distillation(student, teacher), expected)


def test_mean_by_prompt_weighs_short_answers_as_long_ones() -> None:
    found = mean_by_prompt(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 0, 1]), 2)
    assert found.tolist() == [2.0, 8.0]


@pytest.mark.parametrize("constraint", ["lagrangian", "absolute"])
def test_multipliers_push_towards_the_target(constraint: str) -> None:
    settings = LossSettings(constraint=constraint, multiplier_rate=0.1, target_ramp=0.0)  # type: ignore[arg-type]
    constraints = ShareConstraints({"a": 0.6, "b": 0.6}, settings, torch.device("cpu"))
    for _ in range(10):
        constraints.ascend(shares(0.2, 0.9))
    mean = torch.tensor([0.2, 0.9], requires_grad=True)
    slope = torch.autograd.grad(constraints.loss(Shares(mean, torch.ones(2))).sum(), mean)[0]
    assert slope[0] < 0 < slope[1]  # descent raises the first share and lowers the second


def test_lagrangian_multiplier_falls_again_after_the_target() -> None:
    settings = LossSettings(multiplier_rate=0.1, target_ramp=0.0)
    constraints = ShareConstraints({"a": 0.5}, settings, torch.device("cpu"))
    constraints.ascend(shares(0.1))
    high = constraints.multipliers[0].item()
    constraints.ascend(shares(0.8))
    assert constraints.multipliers[0].item() < high


def test_share_gradient_descent_reaches_the_target() -> None:
    settings = LossSettings(multiplier_rate=0.05, penalty=2.0, target_ramp=0.0)
    constraints = ShareConstraints({"a": 0.7}, settings, torch.device("cpu"))
    logit = torch.tensor([-2.0], requires_grad=True)
    for _ in range(600):
        found = Shares(torch.sigmoid(logit), torch.ones(1))
        loss = constraints.loss(found).sum() + 0.2 * torch.sigmoid(logit).sum()  # a cost to SPARSE
        logit.data -= 0.5 * torch.autograd.grad(loss, logit)[0]
        constraints.ascend(Shares(torch.sigmoid(logit).detach(), torch.ones(1)))
    assert torch.sigmoid(logit).item() == pytest.approx(0.7, abs=0.02)


def test_absent_tasks_add_no_loss_and_keep_their_multiplier() -> None:
    constraints = ShareConstraints({"a": 0.5}, LossSettings(), torch.device("cpu"))
    absent = Shares(torch.zeros(1), torch.zeros(1))
    constraints.ascend(absent)
    assert constraints.loss(absent).item() == 0
    assert constraints.multipliers.abs().sum() == 0


def test_share_spread_is_the_variance_within_tasks() -> None:
    values = torch.tensor([0.2, 0.6, 0.9, 0.5], requires_grad=True)
    groups = torch.tensor([0, 0, 1, 0])
    found = Shares(torch.tensor([1.3 / 3, 0.9]), torch.tensor([3.0, 1.0]))
    spread = share_spread(values, groups, found)
    assert spread.item() == pytest.approx(torch.tensor([0.2, 0.6, 0.5]).var(correction=0).item())
    spread.backward()
    assert values.grad is not None
    # It moves prompts towards each other and leaves the mean where it is.
    assert values.grad.sum().abs() < 1e-6
    assert values.grad[0] < 0 < values.grad[1]
    assert values.grad[2] == 0


def test_targets_rise_with_the_run() -> None:
    constraints = ShareConstraints({"a": 0.8}, LossSettings(target_ramp=0.5), torch.device("cpu"))
    seen = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        constraints.advance(progress)
        seen.append(constraints.target.item())
    assert seen == pytest.approx([0.0, 0.4, 0.8, 0.8])


def test_excess_confidence_counts_beyond_the_bound_only() -> None:
    logits = torch.tensor([[[0.0, 3.0], [0.0, -6.0]]])  # one layer, two rows
    assert excess_confidence(logits, 4.0).item() == pytest.approx(2.0)


def test_targets_by_task_resolves_names_and_groups() -> None:
    settings = LossSettings(targets=("local=0.9", "needle=0.3", "early_chunks=0.5"))
    found = targets_by_task(["needle", "multi_key", "repeat_end"], settings)
    assert found == {"needle": 0.3, "multi_key": 0.6, "repeat_end": 0.9, "early_chunks": 0.5}


@pytest.mark.parametrize("entry", ["nothing=0.5", "needle=2", "needle=x", "needle"])
def test_targets_by_task_refuses_other_entries(entry: str) -> None:
    with pytest.raises(ValueError, match=r"loss\.targets"):
        targets_by_task(["needle"], LossSettings(targets=(entry,)))
