"""The attention layers of a loaded model: which get a route, and what rotates their queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.routing.stages import gather_over_stages
from flux_vllm.selection import BACKEND_NAME
from flux_vllm.startup.rope_use import change_after_rope, rotates
from flux_vllm.startup.transformers_rotary import transformers_rotary


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer of a loaded model."""

    index: int
    attention: Any
    """vLLM's Attention."""
    parent: Any
    """The model's module that holds it."""
    rotary: Any
    """The rotary embedding of its queries; None where none is found."""

    @property
    def owner(self) -> int:
        """The layer whose KV cache it attends to, and whose route it takes; mostly itself."""
        from vllm.model_executor.models.utils import extract_layer_index

        shared: str | None = self.attention.kv_sharing_target_layer_name
        return self.index if shared is None else extract_layer_index(shared)

    @property
    def has_full_attention(self) -> bool:
        """Layers with a sliding window of the model's own stay as they are."""
        return self.attention.sliding_window is None


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Find every attention layer of vLLM's model, in order.

    Raises: UnsupportedConfigurationError: attention that routes cannot go with.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    layers: list[AttentionLayer] = []
    for parent in model.modules():
        for attention in parent.children():
            if not isinstance(attention, Attention):
                continue
            if attention.attn_backend.get_name() != BACKEND_NAME:
                raise UnsupportedConfigurationError(
                    f"--attention-backend flux: expected all attention layers to use it, found "
                    f"{attention.layer_name} on {attention.attn_backend.get_name()}; serve this "
                    "model without --attention-backend flux"
                )
            if type(attention) is not Attention:
                raise UnsupportedConfigurationError(
                    "--attention-backend flux: expected plain causal attention in every layer, "
                    f"found {type(attention).__name__} in {attention.layer_name}; serve this model "
                    "without --attention-backend flux"
                )
            index = extract_layer_index(attention.layer_name)
            rotary = getattr(parent, "rotary_emb", None)
            if type(parent).__module__.startswith("transformers."):
                rotary = transformers_rotary(model, parent, attention.head_size)
            layers.append(AttentionLayer(index, attention, parent, rotary))
    return sorted(layers, key=lambda layer: layer.index)


def check_full_attention(model: str, layers: Sequence[AttentionLayer]) -> None:
    """Check that there is full attention, on every pipeline stage; all of them call this.

    Raises: UnsupportedConfigurationError: none, on all stages where one has none: none waits for
        another that was refused.
    """
    full = gather_over_stages([any(layer.has_full_attention for layer in layers)])
    if not any(full):
        raise UnsupportedConfigurationError(
            f"--attention-backend flux: expected layers with full attention in {model}, found "
            "none; serve it without --attention-backend flux"
        )
    without = [stage for stage, has_full in enumerate(full) if not has_full]
    if without:
        raise UnsupportedConfigurationError(
            "--attention-backend flux: expected layers with full attention on every pipeline "
            f"stage, found none of {model} on {without} of {len(full)}; choose a smaller "
            "--pipeline-parallel-size, or serve it without --attention-backend flux"
        )


def layers_with_routes(layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """Choose the layers of full attention, over a KV cache of such a layer."""
    full = {layer.index for layer in layers if layer.has_full_attention}
    return [layer for layer in layers if {layer.index, layer.owner} <= full]


def layers_for_router(model: nn.Module, layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """Choose the layers that a router decides for: of full attention, with RoPE.

    Layers without it beside others with it are those through which a model sees its whole context:
    they stay FULL. A model without any RoPE has no such division: all are chosen. Layers that share
    another's KV cache are chosen with it.

    Raises: UnsupportedConfigurationError: RoPE is in layers with a sliding window alone.
    """
    full = layers_with_routes(layers)
    rotating = {layer.index for layer in layers if rotates(layer.parent) is not False}
    # Of the layers that use RoPE, on any pipeline stage: whether they have a route.
    have_routes = gather_over_stages([layer in full for layer in layers if layer.index in rotating])
    if not have_routes:
        return full
    if not any(have_routes):
        raise UnsupportedConfigurationError(
            '--attention-backend flux with policy "router": expected rotary position embeddings '
            f"(RoPE) in layers with full attention, found none in {type(model).__name__}, whose "
            "layers with a sliding window have them; choose a policy without a router "
            '("full", "sparse", "static")'
        )
    return [layer for layer in full if layer.owner in rotating]


def rotary_of(layer: AttentionLayer) -> Any:
    """Give a layer's rotary embedding; None where queries reach attention unrotated.

    Raises: UnsupportedConfigurationError: what it does to queries cannot be undone.
    """
    parent, attention = layer.parent, layer.attention
    rotary, kind = layer.rotary, type(parent).__name__
    turned, change = rotates(parent), change_after_rope(parent)
    expected, found = "", ""
    if turned is False:
        return None
    if rotary is None:
        expected = "rotary position embeddings (RoPE) as `rotary_emb` of a layer, or none at all"
        found = f"others in {attention.layer_name} ({kind})"
    elif turned is None:
        expected = "rotary position embeddings (RoPE) in every call of a layer, or in none"
        found = f"{kind}, which applies them under a condition"
    elif change is not None:
        expected = "queries that reach attention as RoPE made them"
        found = f"`{change}` after it in {kind}, which a router cannot see through"
    if found:
        raise UnsupportedConfigurationError(
            f"--attention-backend flux: expected {expected}, found {found}; serve this model "
            "without --attention-backend flux"
        )
    return rotary
