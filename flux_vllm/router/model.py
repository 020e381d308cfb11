"""The Layer Router: from a request's pooled query features to two logits, one network a layer.

Dimension legend: L layers, R requests, H head dim, F features (H in the paper).
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

_LAYERS = ("features.0", "features.2", "head.0", "head.2", "head.4")
"""The linear layers of the network, by their names in the checkpoint."""
# SiLU follows these; `features.2` hands its output to the head unchanged.
_SILU_AFTER = ("features.0", "head.0", "head.2")
_ROUTES = 2
_NEVER = -1e4
"""A logit whose probability is 0 in every floating-point format, beside one of 0."""


def paper_widths(head_dim: int) -> tuple[int, int, int, int]:
    """Return the outputs of the first four linear layers in the authors' published routers."""
    return 8 * head_dim, 2 * head_dim, 4 * head_dim, head_dim


def linear_shapes(inputs: int, widths: tuple[int, ...] = ()) -> dict[str, tuple[int, int]]:
    """List the router's linear layers: checkpoint name to (outputs, inputs).

    Args:
        inputs: F.
        widths: outputs of the first four; empty: the paper's for F = H.
    """
    outputs = (*(widths or paper_widths(inputs)), _ROUTES)
    return dict(zip(_LAYERS, zip(outputs, (inputs, *outputs), strict=False), strict=True))


class LayerRouter(nn.Module):
    """The routers of all layers of a model, held stacked so that one object serves them all.

    Per layer: Linear(F, w0) SiLU Linear(w0, w1), then Linear(w1, w2) SiLU Linear(w2, w3) SiLU
    Linear(w3, 2), with biases.

    Args:
        num_layers: layers of the model.
        head_dim: head dimension H of the model's queries.
        vectors: pooled queries that a layer's router sees, F = vectors * H.
        widths: outputs of the first four linear layers; empty: the paper's 8H, 2H, 4H, H.

    Source: arXiv 2604.07394, section 3; sizes of the authors' published checkpoints.
    """

    _always_sparse: torch.Tensor
    """[L] bool."""
    _never_full: torch.Tensor
    """[2]: logits that make P(FULL) 0; columns as in `Route`."""

    def __init__(
        self, num_layers: int, head_dim: int, vectors: int = 1, widths: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.head_dim = head_dim
        self.num_inputs = vectors * head_dim
        self.shapes = linear_shapes(self.num_inputs, widths or paper_widths(head_dim))
        for name, (out, inp) in self.shapes.items():
            bound = inp**-0.5  # torch.nn.Linear's own initialisation
            weight = torch.empty(num_layers, out, inp).uniform_(-bound, bound)
            bias = torch.empty(num_layers, out).uniform_(-bound, bound)
            self.register_parameter(_attr(name, "weight"), nn.Parameter(weight))
            self.register_parameter(_attr(name, "bias"), nn.Parameter(bias))
        always_sparse = torch.zeros(num_layers, dtype=torch.bool)
        self.register_buffer("_always_sparse", always_sparse, persistent=False)
        never_full = torch.tensor([0.0, _NEVER])
        self.register_buffer("_never_full", never_full, persistent=False)

    def linear(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the stacked weight [L, out, in] and bias [L, out] of one linear layer."""
        return getattr(self, _attr(name, "weight")), getattr(self, _attr(name, "bias"))

    def make_sparse(self, layers: Iterable[int]) -> None:
        """Let some layers' routers say SPARSE to everything, numbers that are not finite too.

        At a threshold of 0 even P(FULL) = 0 is FULL.
        """
        self._always_sparse[list(layers)] = True

    def forward(self, layer: int, pooled_query_features: torch.Tensor) -> torch.Tensor:
        """Score one layer's requests.

        Args:
            layer: index of the model's layer.
            pooled_query_features: [R, F] float, pooled queries before RoPE.

        Returns: router_logits [R, 2] in the parameters' dtype; columns as in `Route`.
        Host sync: none. CUDA graph: safe.
        """
        x = pooled_query_features.to(self.linear("head.4")[1].dtype)
        for name in self.shapes:
            weight, bias = self.linear(name)
            x = functional.linear(x, weight[layer], bias[layer])
            if name in _SILU_AFTER:
                x = functional.silu(x)
        return torch.where(self._always_sparse[layer], self._never_full, x)

    def forward_all(self, pooled_query_features: torch.Tensor) -> torch.Tensor:
        """Score every layer at once: [L, R, F] to router_logits [L, R, 2]."""
        x = pooled_query_features.to(self.linear("head.4")[1].dtype)
        for name in self.shapes:
            weight, bias = self.linear(name)
            x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
            if name in _SILU_AFTER:
                x = functional.silu(x)
        return torch.where(self._always_sparse[:, None, None], self._never_full, x)


def _attr(name: str, kind: str) -> str:
    return f"{name.replace('.', '_')}_{kind}"
