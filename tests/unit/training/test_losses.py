"""Oracles: the divergence written out, means by hand."""

import pytest
import torch
from torch.nn import functional

from training.losses import cross_entropy, distillation, excess_confidence, mean_by_prompt


def test_distillation_is_zero_for_equal_logits_and_kl_otherwise() -> None:
    student, teacher = torch.randn(2, 7, 11)
    assert distillation(teacher, teacher).abs().max() < 1e-6
    p, q = teacher.softmax(dim=-1), student.softmax(dim=-1)
    expected = (p * (p.log() - q.log())).sum(dim=-1)
    torch.testing.assert_close(distillation(student, teacher), expected)


def test_cross_entropy_is_the_tokens_surprise() -> None:
    logits, tokens = torch.randn(7, 11), torch.arange(7)
    expected = -(logits.softmax(dim=-1) * functional.one_hot(tokens, 11)).sum(dim=-1).log()
    torch.testing.assert_close(cross_entropy(logits, tokens), expected)


def test_mean_by_prompt_weighs_short_answers_as_long_ones() -> None:
    found = mean_by_prompt(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0, 0, 1]), 2)
    assert found.tolist() == [2.0, 8.0]


def test_excess_confidence_counts_beyond_the_bound_only() -> None:
    logits = torch.tensor([[[0.0, 3.0], [0.0, -6.0]]])  # one layer, two prompts
    assert excess_confidence(logits, 4.0).item() == pytest.approx(2.0)
    layers = torch.cat([logits, logits])  # summed over layers, averaged over prompts
    assert excess_confidence(layers, 4.0).item() == pytest.approx(4.0)
