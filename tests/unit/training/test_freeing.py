"""Layers by how often they are FULL.

Oracle: shares counted by hand.
"""

import torch

from flux_vllm.router.model import LayerRouter
from training.freeing import freeing_order


class _Written(LayerRouter):
    """A router whose P(FULL) are the features themselves."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers, 8, 1)

    def forward_all(self, pooled_query_features: torch.Tensor) -> torch.Tensor:
        probability = pooled_query_features[..., :1]
        return torch.cat([(1 - probability).log(), probability.log()], dim=-1)


def test_layers_that_are_seldom_full_come_first() -> None:
    probability = [
        [0.9, 0.9, 0.9, 0.1],  # FULL for three of four
        [0.49, 0.49, 0.49, 0.49],  # never, but nearly
        [0.5, 0.01, 0.01, 0.01],  # once
        [0.02, 0.02, 0.02, 0.02],  # never
    ]
    features = torch.tensor(probability)[..., None]
    assert freeing_order(_Written(4), features) == (3, 1, 2, 0)
