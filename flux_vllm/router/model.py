"""The Layer Router: from a request's pooled query features to two logits, one network a layer.

Dimension legend: L layers, R requests, H head dim.
"""

import torch
from torch import nn
from torch.nn import functional

# One linear layer of the network: name in the checkpoint, output and input width as multiples of
# head_dim. The head's last layer has two outputs, one a route.
_LAYERS = (
    ("features.0", 8, 1),
    ("features.2", 2, 8),
    ("head.0", 4, 2),
    ("head.2", 1, 4),
    ("head.4", None, 1),
)
# SiLU follows these; `features.2` hands its output to the head unchanged.
_SILU_AFTER = ("features.0", "head.0", "head.2")


def linear_shapes(head_dim: int) -> dict[str, tuple[int, int]]:
    """List the router's linear layers: checkpoint name to (outputs, inputs)."""
    return {
        name: (2 if out is None else out * head_dim, inp * head_dim) for name, out, inp in _LAYERS
    }


class LayerRouter(nn.Module):
    """The routers of all layers of a model, held stacked so that one object serves them all.

    Per layer: Linear(H, 8H) SiLU Linear(8H, 2H), then Linear(2H, 4H) SiLU Linear(4H, H) SiLU
    Linear(H, 2), with biases.

    Args:
        num_layers: layers of the model.
        head_dim: head dimension H of the model's queries.

    Source: arXiv 2604.07394, section 3; sizes of the authors' published checkpoints.
    """

    def __init__(self, num_layers: int, head_dim: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.head_dim = head_dim
        self.shapes = linear_shapes(head_dim)
        for name, (out, inp) in self.shapes.items():
            bound = inp**-0.5  # torch.nn.Linear's own initialisation
            weight = torch.empty(num_layers, out, inp).uniform_(-bound, bound)
            bias = torch.empty(num_layers, out).uniform_(-bound, bound)
            self.register_parameter(_attr(name, "weight"), nn.Parameter(weight))
            self.register_parameter(_attr(name, "bias"), nn.Parameter(bias))

    def linear(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the stacked weight [L, out, in] and bias [L, out] of one linear layer."""
        return getattr(self, _attr(name, "weight")), getattr(self, _attr(name, "bias"))

    def forward(self, layer: int, pooled_query_features: torch.Tensor) -> torch.Tensor:
        """Score one layer's requests.

        Args:
            layer: index of the model's layer.
            pooled_query_features: [R, H] float, the mean query before RoPE.

        Returns: router_logits [R, 2] in the parameters' dtype; columns as in `Route`.
        Host sync: none. CUDA graph: safe.
        """
        x = pooled_query_features.to(self.linear("head.4")[1].dtype)
        for name in self.shapes:
            weight, bias = self.linear(name)
            x = functional.linear(x, weight[layer], bias[layer])
            if name in _SILU_AFTER:
                x = functional.silu(x)
        return x

    def forward_all(self, pooled_query_features: torch.Tensor) -> torch.Tensor:
        """Score every layer at once: [L, R, H] to router_logits [L, R, 2]."""
        x = pooled_query_features.to(self.linear("head.4")[1].dtype)
        for name in self.shapes:
            weight, bias = self.linear(name)
            x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
            if name in _SILU_AFTER:
                x = functional.silu(x)
        return x


def _attr(name: str, kind: str) -> str:
    return f"{name.replace('.', '_')}_{kind}"
