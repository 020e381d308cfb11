"""The decision itself: FULL or SPARSE attention, for one request in one layer."""

from enum import IntEnum

import torch

DEFAULT_THRESHOLD = 0.5
"""Of P(FULL): the paper's argmax."""


class Route(IntEnum):
    """A route; the values of SPARSE and FULL are the columns of the router's logits.

    Source: arXiv 2604.07394 (index 1 = FULL, index 0 = SPARSE).
    """

    UNDECIDED = -1
    SPARSE = 0
    FULL = 1


def full_probability(router_logits: torch.Tensor) -> torch.Tensor:
    """Turn router logits into P(FULL).

    Args:
        router_logits: [..., 2] float; columns are `Route.SPARSE` and `Route.FULL`.

    Returns: [...] float32 in [0, 1].
    Host sync: none. CUDA graph: safe.
    """
    return router_logits.float().softmax(dim=-1)[..., Route.FULL]


def choose_route(probability: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """Choose FULL wherever P(FULL) reaches the threshold, and where it is NaN.

    Args:
        probability: [...] float32, P(FULL); NaN where the router's logits were not finite.
        threshold: in [0, 1]; 0.5 is the paper's argmax, lower means more FULL layers. A float32
            scalar on the same device may change after a CUDA graph was captured.

    Returns: [...] int8 of `Route` values.
    Host sync: none. CUDA graph: safe.
    """
    return torch.where(probability < threshold, int(Route.SPARSE), int(Route.FULL)).to(torch.int8)
