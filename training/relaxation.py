"""The differentiable stand-in for a hard choice between FULL and SPARSE.

Dimension legend: L layers, B prompts.
"""

import math

import torch

from flux_vllm.router.route import Route
from training.config import RelaxationSettings


def temperature(step: int, steps: int, settings: RelaxationSettings) -> float:
    """Follow a cosine from the first temperature to the last, then stay there."""
    span = max(1.0, settings.schedule_fraction * steps)
    done = min(1.0, step / span)
    weight = 0.5 * (1 + math.cos(math.pi * done))
    return settings.temperature_end + weight * (
        settings.temperature_start - settings.temperature_end
    )


def logistic_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw the difference of two Gumbel variables, on the CPU, float32."""
    uniform = torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return uniform.log() - (-uniform).log1p()


def straight_through(
    router_logits: torch.Tensor, noise: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Sample FULL or SPARSE; gradients flow as through the Gumbel-softmax.

    Args:
        router_logits: [..., 2]; columns are `Route` values.
        noise: [...], of `logistic_noise`.
        temperature: of the Gumbel-softmax.

    Returns: [...] exactly 1 for FULL or 0 for SPARSE.
    """
    lead = router_logits[..., Route.FULL] - router_logits[..., Route.SPARSE] + noise
    soft = torch.sigmoid(lead / temperature)
    hard = (lead > 0).to(soft.dtype)
    return _ReplaceForward.apply(hard, soft)  # type: ignore[no-any-return]


class _ReplaceForward(torch.autograd.Function):
    """The first argument's value with the second one's gradient, free of rounding."""

    @staticmethod
    def forward(ctx: object, hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradient
