"""How a layer decides, in training and evaluation; 1 is FULL and 0 is SPARSE.

Dimension legend: L layers, B prompts, C chunks, H head dim.
"""

from typing import Protocol

import torch

from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route, choose_route, full_probability
from training.relaxation import straight_through
from training.standardize import StandardizedRouter


class Policy(Protocol):
    """Decides layer by layer while the model runs."""

    def decide(self, layer: int, features: torch.Tensor) -> torch.Tensor | Route:
        """Choose for one layer.

        Args:
            layer: index.
            features: [B, C, H] float32 pooled queries.

        Returns: [B, C] float, 1 or 0; or one Route for all prompts.
        """
        ...


class StaticPolicy:
    """The same routes for every prompt.

    Args:
        routes: one Route a layer.
    """

    def __init__(self, routes: list[Route]) -> None:
        self.routes = routes

    @classmethod
    def all_full(cls, num_layers: int) -> "StaticPolicy":
        """Make the reference: every layer FULL."""
        return cls([Route.FULL] * num_layers)

    def decide(self, layer: int, features: torch.Tensor) -> Route:
        """Return the layer's route."""
        return self.routes[layer]


class ThresholdPolicy:
    """A trained router, as the server runs it.

    Args:
        router: the routers, float32.
        threshold: FULL where P(FULL) reaches it.
    """

    def __init__(self, router: LayerRouter, threshold: float) -> None:
        self.router = router
        self.threshold = threshold

    def decide(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        """Score and compare."""
        logits = self.router(layer, features.flatten(0, 1))
        routes = choose_route(full_probability(logits), self.threshold)
        return routes.view(features.shape[:2]).float()


class RelaxedPolicy:
    """Sampled routes that pass gradients to the router.

    Args:
        router: in training.
        noise: [L, B, C] of `logistic_noise`, drawn beforehand so that recomputation repeats it.
        temperature: of the Gumbel-softmax.
    """

    def __init__(self, router: StandardizedRouter, noise: torch.Tensor, temperature: float) -> None:
        self.router = router
        self.noise = noise
        self.temperature = temperature

    def decide(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        """Score and sample."""
        logits = self.router(layer, features.detach())
        return straight_through(logits, self.noise[layer], self.temperature)


class CachedContextPolicy:
    """Another policy, with the first chunk's routes given: a context cached by other requests.

    Args:
        policy: decides for the chunks that follow.
        cached: [L, B] float routes the first chunk was computed under.
    """

    def __init__(self, policy: Policy, cached: torch.Tensor) -> None:
        self.policy = policy
        self.cached = cached

    def decide(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        """Decide, then put the given routes in the first chunk's place."""
        decided = self.policy.decide(layer, features)
        if isinstance(decided, Route):
            decided = features.new_full(features.shape[:2], float(decided))
        # A prompt of one chunk shares nothing; the plan pads C, so column 0 is then its only one.
        return torch.cat([self.cached[layer][:, None], decided[:, 1:]], dim=1)
