"""How the layers of a batch's prompts are decided, in training and evaluation; 1 is FULL, 0 SPARSE.

Dimension legend: L layers, B prompts, F features of a layer's router.
"""

from collections.abc import Iterable
from typing import Protocol

import torch

from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route, choose_route, full_probability
from training.relaxation import straight_through
from training.standardize import StandardizedRouter


class Policy(Protocol):
    """Decides all layers before the prompts run."""

    def decide(self, features: torch.Tensor) -> torch.Tensor:
        """Choose the routes.

        Args:
            features: [L, B, F] float32, what each layer's router sees of each prompt.

        Returns: [L, B] float32, 1 or 0.
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

    @classmethod
    def with_sparse(cls, num_layers: int, sparse_layers: Iterable[int]) -> "StaticPolicy":
        """Make a pattern: these layers SPARSE, the others FULL."""
        sparse = set(sparse_layers)
        return cls([Route.SPARSE if at in sparse else Route.FULL for at in range(num_layers)])

    def decide(self, features: torch.Tensor) -> torch.Tensor:
        """Return the layers' routes for every prompt."""
        routes = features.new_tensor([float(route) for route in self.routes])
        return routes[:, None].expand(-1, features.shape[1])


class ThresholdPolicy:
    """A trained router, as the server runs it.

    Args:
        router: the routers, float32.
        threshold: FULL where P(FULL) reaches it.
    """

    def __init__(self, router: LayerRouter, threshold: float) -> None:
        self.router = router
        self.threshold = threshold

    def decide(self, features: torch.Tensor) -> torch.Tensor:
        """Score and compare."""
        probability = full_probability(self.router.forward_all(features))
        return choose_route(probability, self.threshold).float()


class RelaxedPolicy:
    """Sampled routes that pass gradients to the router.

    Args:
        router: in training.
        noise: [L, B] of `logistic_noise`, drawn beforehand so that whoever computes a prompt draws
            the same.
        temperature: of the Gumbel-softmax.
    """

    def __init__(self, router: StandardizedRouter, noise: torch.Tensor, temperature: float) -> None:
        self.router = router
        self.noise = noise
        self.temperature = temperature

    def decide(self, features: torch.Tensor) -> torch.Tensor:
        """Score and sample."""
        return straight_through(self.router(features), self.noise, self.temperature)
