"""The routers as training sees them: inputs of zero mean and unit deviation, layer by layer.

Pooled queries of different prompts differ by little against their mean. Training on standardised
inputs learns many times faster, and the standardisation is linear, so that `fold` hides it in
the first Linear: the file that is written is a plain router.

Dimension legend: L layers, R prompts, F features of a layer's router.
"""

import copy

import torch
from torch import nn

from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route

_FIRST, _LAST = "features.0", "head.4"
_LEAST_DEVIATION = 0.1
"""Deviations below this share of the layer's median are raised to it: they are noise."""


class StandardizedRouter(nn.Module):
    """A LayerRouter behind a fixed affine map of its inputs.

    Args:
        router: the routers to train.
    """

    mean: torch.Tensor
    inverse_deviation: torch.Tensor

    def __init__(self, router: LayerRouter) -> None:
        super().__init__()
        self.router = router
        shape = (router.num_layers, router.num_inputs)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("inverse_deviation", torch.ones(shape))

    def begin_with_full(self, full_bias: float) -> None:
        """Make every layer choose FULL at first, whatever it sees."""
        weight, bias = self.router.linear(_LAST)
        with torch.no_grad():
            weight.mul_(0.1)
            bias[:, Route.FULL] = full_bias
            bias[:, Route.SPARSE] = 0.0

    def fit(self, features: torch.Tensor) -> None:
        """Take mean and deviation from examples.

        Args:
            features: [L, R, F] float32, at least two prompts.
        """
        deviation = features.std(dim=1)
        least = _LEAST_DEVIATION * deviation.median(dim=1, keepdim=True).values
        self.mean.copy_(features.mean(dim=1))
        self.inverse_deviation.copy_(1 / deviation.clamp(min=1e-6).maximum(least))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Score all layers: [L, R, F] to router_logits [L, R, 2]."""
        centred = features - self.mean[:, None]
        return self.router.forward_all(centred * self.inverse_deviation[:, None])

    def fold(self, dtype: torch.dtype = torch.float32) -> LayerRouter:
        """Return a plain router that computes the same from raw inputs.

        Args:
            dtype: the first layer's weights are rounded to it before its bias is found, so that
                the mean is taken off by the weights it meets.

        Returns: LayerRouter, float32, on the CPU, without gradients.
        """
        folded = copy.deepcopy(self.router).cpu().float().requires_grad_(False)
        weight, bias = folded.linear(_FIRST)
        weight.copy_((weight * self.inverse_deviation.cpu()[:, None]).to(dtype))
        shift = torch.einsum("loh,lh->lo", weight.double(), self.mean.cpu().double())
        bias.sub_(shift.float())
        return folded
