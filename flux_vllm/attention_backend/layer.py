"""What an attention layer needs to take part in routing, bound to it once the model is loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.routing.runtime import FluxRuntime


@dataclass(slots=True)
class LayerBinding:
    """The routing side of one attention layer."""

    runtime: FluxRuntime
    layer: int
    """Index of the model's layer."""


def bound_layers(context: Mapping[str, Any], names: Iterable[str]) -> list[Any]:
    """Find the routed ones among the attention layers of a KV cache group.

    Args:
        context: vLLM's attention modules by name (`static_forward_context`).
        names: of the group's layers.

    Returns: the layers that have a LayerBinding, in the order in which they run. The others have a
        sliding window of their own, or are a drafter's, on another backend.
    Raises: UnsupportedConfigurationError: a layer without such a window has no binding either: it
        would attend FULL in silence.
    """
    layers = [(name, context[name]) for name in names if hasattr(context[name].impl, "binding")]
    bound = [layer for _, layer in layers if layer.impl.binding is not None]
    missed = [
        name
        for name, layer in layers
        if layer.impl.binding is None and layer.sliding_window is None
    ]
    if missed:
        raise UnsupportedConfigurationError(
            "--attention-backend flux: expected every layer with full attention to be bound to "
            f"routes before the KV cache is made, found {len(missed)} that are not, {missed[0]} "
            "first; this way of starting vLLM's worker passes flux by, so serve without "
            "--attention-backend flux, and report it"
        )
    return sorted(bound, key=lambda layer: layer.impl.binding.layer)
