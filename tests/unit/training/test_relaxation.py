"""Oracle: the Gumbel-softmax written out."""

import pytest
import torch

from training.config import RelaxationSettings
from training.relaxation import logistic_noise, straight_through, temperature


def test_temperature_follows_the_schedule() -> None:
    settings = RelaxationSettings()
    values = [temperature(step, 100, settings) for step in (0, 30, 60, 100)]
    assert values == pytest.approx([1.5, 1.25, 1.0, 1.0])


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    logits = torch.randn(50, 2, requires_grad=True)
    noise = logistic_noise((50,), torch.Generator().manual_seed(1))
    z = straight_through(logits, noise, 1.3)
    lead = logits[:, 1] - logits[:, 0] + noise
    assert torch.equal(z, (lead > 0).float())
    weight = torch.randn(50)
    found = torch.autograd.grad((z * weight).sum(), logits, retain_graph=True)[0]
    expected = torch.autograd.grad((torch.sigmoid(lead / 1.3) * weight).sum(), logits)[0]
    torch.testing.assert_close(found, expected)


def test_logistic_noise_samples_the_router_probability() -> None:
    noise = logistic_noise((40000,), torch.Generator().manual_seed(0))
    share = (1.2 + noise > 0).float().mean().item()
    assert share == pytest.approx(torch.sigmoid(torch.tensor(1.2)).item(), abs=0.01)
