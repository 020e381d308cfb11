"""Routers fitted to made-up costs. Oracle: which prompts need which layer, known beforehand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flux_vllm.router.inputs import RouterInputs, parse_inputs
from flux_vllm.router.route import Route
from training.config import (
    CostSettings,
    LossSettings,
    OptimizerSettings,
    RouterSettings,
    TrainConfig,
)
from training.costs.fit import assemble, describe, fit_router
from training.costs.measurements import Measurements
from training.costs.quadratic import QuadraticCosts

PROMPTS, LAYERS, HEAD = 200, 5, 16
POOLS = ["tail:1", "length", "overlap:8"]
INPUTS: RouterInputs = parse_inputs(POOLS, [0, 4], [2])
NEEDED = 1
"""The layer that half of the prompts need; the last one nobody does."""


def config(nats: float = 0.02, length_power: float = 0.5) -> TrainConfig:
    return TrainConfig(
        model="",
        out="",
        router=RouterSettings(widths=(8, 8, 8, 8)),
        loss=LossSettings(budget_nats=nats, budget_share=1.0),
        costs=CostSettings(input_noise=0.3, length_power=length_power),
        optimizer=OptimizerSettings(steps=300, batch_size=64, learning_rate=1e-2),
    )


def make(telling: int = 0) -> tuple[Measurements, QuadraticCosts]:
    """Make prompts of two kinds, which one pool of the context layer tells apart."""
    rng = np.random.default_rng(0)
    needs = np.arange(PROMPTS) % 2 == 1
    pooled = rng.normal(size=(PROMPTS, LAYERS, len(POOLS), HEAD)).astype(np.float16)
    pooled[:, 2, telling, 0] += 4 * needs
    lengths = torch.full((PROMPTS, LAYERS), 0.02)
    lengths[:, NEEDED] += torch.from_numpy(needs).float()
    lengths[:, -1] = 0.0
    costs = QuadraticCosts(lengths, torch.nn.functional.normalize(torch.ones(LAYERS, 2), dim=1))
    every = np.ones((PROMPTS, 1, LAYERS))
    return (
        Measurements(
            pooled,
            every.astype(np.uint8),
            costs.nats(torch.ones(PROMPTS, LAYERS))[:, None].numpy(),
            np.full((PROMPTS, 1, LAYERS), np.nan, np.float32),
            np.full(PROMPTS, 100),
            np.arange(PROMPTS),
            np.zeros(PROMPTS, bool),
        ),
        costs,
    )


def fit(nats: float, telling: int = 0) -> torch.Tensor:
    """Return P(FULL) [L, N] of routers with a budget."""
    measured, costs = make(telling)
    router, _ = fit_router(measured, costs, INPUTS, config(nats))
    with torch.no_grad():
        return router(assemble(measured, INPUTS)).softmax(dim=-1)[..., Route.FULL]


@pytest.mark.parametrize("telling", [0, 2], ids=["a-query", "what-is-told"])
def test_full_where_it_is_needed_and_nowhere_else(telling: int) -> None:
    full = fit(0.02, telling) > 0.5
    needs = torch.arange(PROMPTS) % 2 == 1
    assert full[NEEDED, needs].float().mean() > 0.95
    assert full[NEEDED, ~needs].float().mean() < 0.05
    assert not full[-1].any()


def test_a_larger_budget_leaves_fewer_full_layers() -> None:
    shares = [float(fit(nats).mean()) for nats in (1e-4, 0.02, 1.0)]
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.2


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_the_budget_is_a_share_of_what_is_at_stake(share: float) -> None:
    measured, costs = make()
    settings = config(10.0)
    settings = replace(settings, loss=replace(settings.loss, budget_share=share))
    router, told = fit_router(measured, costs, INPUTS, settings)
    at_stake = -np.expm1(-measured.nats).mean()  # a prompt counts one nat at most
    assert told["all_sparse_nats"] == pytest.approx(at_stake, rel=1e-3)
    assert told["budget_nats"] == pytest.approx(share * told["all_sparse_nats"], abs=1e-5)
    with torch.no_grad():
        full = router(assemble(measured, INPUTS)).softmax(dim=-1)[..., Route.FULL] > 0.5
    needed = full[NEEDED, torch.arange(PROMPTS) % 2 == 1].float().mean()
    assert needed > 0.8 if share < 1 else needed < 0.2


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_sparse_goes_where_it_leaves_more_keys_unread(power: float) -> None:
    measured, _ = make(telling=1)
    is_long = np.arange(PROMPTS) % 2 == 1
    # Every prompt loses as much, the long ones a little more.
    lengths = torch.full((PROMPTS, LAYERS), 0.2) + 0.02 * torch.from_numpy(is_long).float()[:, None]
    costs = QuadraticCosts(lengths, torch.eye(LAYERS))
    measured = replace(measured, tokens=np.where(is_long, 20_000, 2300))
    router, _ = fit_router(measured, costs, INPUTS, config(0.1, power))
    with torch.no_grad():
        full = router(assemble(measured, INPUTS)).softmax(dim=-1)[..., Route.FULL].mean(dim=0)
    short, long = full[~is_long].mean(), full[is_long].mean()
    assert (short > long + 0.5) if power else (long > short)


def test_the_file_computes_what_was_fitted() -> None:
    measured, costs = make()
    router, _ = fit_router(measured, costs, INPUTS, config())
    features = assemble(measured, INPUTS)
    folded = router.fold()
    with torch.no_grad():
        torch.testing.assert_close(
            folded.forward_all(features), router(features), rtol=1e-3, atol=1e-3
        )
    # A layer's own queries play no part, and all layers share the first two linear layers.
    weight, _ = folded.linear("features.0")
    assert not weight[:, :, : len(POOLS) * HEAD].any()
    assert torch.equal(weight[0], weight[-1])
    assert INPUTS.layers_read(weight, range(LAYERS)) == {2}  # the one at which a probe ends


def test_without_context_layers_there_is_nothing_to_share() -> None:
    measured, costs = make()
    own = parse_inputs(POOLS, [0, 4], [])
    with pytest.raises(ValueError, match="router.context_depths"):
        fit_router(measured, costs, own, config())


def test_describe_counts_shares_nats_and_need() -> None:
    measured, costs = make()
    router, _ = fit_router(measured, costs, INPUTS, config())
    folded = router.fold()
    never, some = describe(folded, measured, costs, INPUTS, config().router, (1.0, 0.5))
    assert never["sparse_share"] == 1.0
    assert never["nats"] == pytest.approx(float(measured.nats.mean()), abs=1e-4)
    assert never["need_correlation"] is None
    # All prompts are as long: the keys left unread are the share of SPARSE.
    assert never["unread_share"] == 1.0
    assert some["unread_share"] == pytest.approx(some["sparse_share"])
    assert some["nats"] < 0.2 * never["nats"]
    assert some["need_correlation"] > 0.8
