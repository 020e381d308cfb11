"""All layers decided at once; oracle: the router's own numbers, compared by hand."""

import pytest
import torch

from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route
from training.policies import RelaxedPolicy, StaticPolicy, ThresholdPolicy
from training.standardize import StandardizedRouter

LAYERS, PROMPTS, HEAD_DIM, VECTORS = 4, 5, 8, 3


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(LAYERS, PROMPTS, VECTORS * HEAD_DIM)


@pytest.fixture
def router() -> LayerRouter:
    return LayerRouter(LAYERS, HEAD_DIM, VECTORS, (16, 12, 10, 6)).requires_grad_(False)


def test_static_routes_are_the_same_for_every_prompt(features: torch.Tensor) -> None:
    routes = StaticPolicy([Route.FULL, Route.SPARSE, Route.SPARSE, Route.FULL]).decide(features)
    assert routes.tolist() == [[1.0] * 5, [0.0] * 5, [0.0] * 5, [1.0] * 5]
    assert StaticPolicy.with_sparse(4, [1, 2]).decide(features).tolist() == routes.tolist()
    assert StaticPolicy.all_full(4).decide(features).tolist() == [[1.0] * 5] * 4


def test_threshold_policy_decides_as_the_router_alone(
    router: LayerRouter, features: torch.Tensor
) -> None:
    logits = torch.stack([router(layer, features[layer]) for layer in range(LAYERS)])
    probability = logits.exp()[..., 1] / logits.exp().sum(dim=-1)
    middle = probability.median().item()
    for threshold in (0.0, middle, 1.0):
        routes = ThresholdPolicy(router, threshold).decide(features)
        assert routes.dtype == torch.float32
        assert torch.equal(routes, (probability >= threshold).float())
    assert ThresholdPolicy(router, 0.0).decide(features).all()
    assert not ThresholdPolicy(router, 1.0).decide(features).any()


def test_relaxed_policy_samples_what_the_noise_decides(
    router: LayerRouter, features: torch.Tensor
) -> None:
    standardized = StandardizedRouter(router.requires_grad_())
    noise = torch.randn(LAYERS, PROMPTS)
    routes = RelaxedPolicy(standardized, noise, 0.7).decide(features)
    logits = router.forward_all(features)
    lead = logits[..., 1] - logits[..., 0] + noise
    assert torch.equal(routes.detach(), (lead > 0).float())
    weight = torch.randn(LAYERS, PROMPTS)
    found = torch.autograd.grad((routes * weight).sum(), list(router.parameters()))
    soft = torch.sigmoid(lead / 0.7)
    expected = torch.autograd.grad((soft * weight).sum(), list(router.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
