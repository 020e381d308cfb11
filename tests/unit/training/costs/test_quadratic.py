"""The model of costs. Oracle: made-up lengths and directions, and sums over all routes."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from training.costs.measurements import Measurements
from training.costs.quadratic import QuadraticCosts, fit_costs, nested_patterns

PROMPTS, LAYERS, RANK = 120, 6, 2


@pytest.fixture
def costs() -> QuadraticCosts:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.rand(PROMPTS, LAYERS, generator=generator) * torch.logspace(-1, 0.3, LAYERS)
    need = torch.exp(torch.randn(PROMPTS, 1, generator=generator))
    directions = 1 + 0.5 * torch.randn(LAYERS, RANK, generator=generator)
    return QuadraticCosts(lengths * need, functional.normalize(directions, dim=1))


def measured(costs: QuadraticCosts) -> Measurements:
    """Measure all SPARSE, and one random sample with slopes, without an error."""
    generator = torch.Generator().manual_seed(4)
    sample = (torch.rand(PROMPTS, LAYERS, generator=generator) < 0.6).float().requires_grad_(True)
    nats = costs.nats(sample)
    (slopes,) = torch.autograd.grad(nats.sum(), sample)
    every = torch.ones(PROMPTS, LAYERS)
    sparse = torch.stack([every, sample.detach()], dim=1)
    return Measurements(
        pooled=np.zeros((PROMPTS, LAYERS, 1, 2), np.float16),
        sparse=sparse.numpy().astype(np.uint8),
        nats=torch.stack([costs.nats(every), nats.detach()], dim=1).numpy(),
        slopes=torch.stack([torch.full_like(every, torch.nan), slopes], dim=1).numpy(),
        tokens=np.full(PROMPTS, 100),
        place=np.arange(PROMPTS),
        held_out=np.zeros(PROMPTS, bool),
    )


def test_costs_of_other_routes_follow(costs: QuadraticCosts) -> None:
    found = fit_costs(measured(costs), rank=RANK + 1)
    other = (torch.rand(PROMPTS, LAYERS, generator=torch.Generator().manual_seed(5)) < 0.5).float()
    expected, guessed = costs.nats(other), found.nats(other)
    error = torch.log(guessed + 2e-3) - torch.log(expected + 2e-3)
    assert error.abs().median() < 0.15
    # Knowing all SPARSE alone, scaled by the share, is worse by far.
    naive = costs.nats(torch.ones_like(other)) * other.mean(dim=1).square()
    naive_error = torch.log(naive + 2e-3) - torch.log(expected + 2e-3)
    assert error.square().mean() < 0.1 * naive_error.square().mean()


def test_a_full_layer_more_never_costs(costs: QuadraticCosts) -> None:
    """Though the measured slopes say, of one layer, that being SPARSE makes answers better."""
    taken = measured(costs)
    taken.slopes[:, 1, 0] = -np.abs(taken.slopes[:, 1]).max(axis=1)
    found = fit_costs(taken, steps=100)
    assert (found.directions >= 0).all()
    other = (torch.rand(PROMPTS, LAYERS, generator=torch.Generator().manual_seed(7)) < 0.7).float()
    for layer in range(LAYERS):
        with_layer, without = other.clone(), other.clone()
        with_layer[:, layer], without[:, layer] = 1, 0
        assert (found.nats(without) <= found.nats(with_layer)).all()


def test_expected_cost_is_the_mean_over_all_routes(costs: QuadraticCosts) -> None:
    chance = torch.rand(PROMPTS, LAYERS, generator=torch.Generator().manual_seed(6))
    mean = torch.zeros(PROMPTS, dtype=torch.float64)
    for routes in itertools.product((0.0, 1.0), repeat=LAYERS):
        sparse = torch.tensor(routes).expand(PROMPTS, -1)
        weight = torch.where(sparse > 0, chance, 1 - chance).double().prod(dim=1)
        mean += weight * costs.nats(sparse).double()
    torch.testing.assert_close(costs.expected_nats(chance).double(), mean, rtol=1e-4, atol=1e-6)


def test_patterns_are_nested_and_greedy(costs: QuadraticCosts) -> None:
    found = nested_patterns(costs, [5, 3, 1])
    assert {count: len(layers) for count, layers in found.items()} == {5: 5, 3: 3, 1: 1}
    assert set(found[1]) < set(found[3]) < set(found[5])
    every = torch.eye(LAYERS)
    alone = [float(costs.nats((1 - row).expand(PROMPTS, -1)).mean()) for row in every]
    assert found[5] == [layer for layer in range(LAYERS) if layer != int(np.argmin(alone))]
