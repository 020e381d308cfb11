"""In which order a server gives back the KV memory of layers: those first that are seldom FULL.

Dimension legend: L layers, P prompts, F features.
"""

import torch

from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import full_probability

_THRESHOLD = 0.5


@torch.no_grad()
def freeing_order(router: LayerRouter, features: torch.Tensor) -> tuple[int, ...]:
    """Order layers by the share of prompts for which they are FULL at the default threshold.

    Among equals the mean of P(FULL) decides.

    Args:
        router: of all layers, float32, on the CPU.
        features: [L, P, F] float, of any device.

    Returns: each layer's index once.
    """
    probability = full_probability(router.forward_all(features.float().cpu()))
    share = (probability >= _THRESHOLD).float().mean(1).tolist()
    mean = probability.mean(1).tolist()
    return tuple(sorted(range(router.num_layers), key=lambda layer: (share[layer], mean[layer])))
