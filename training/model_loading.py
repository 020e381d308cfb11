"""Load a language model and its tokenizer for routing."""

from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from flux_vllm.errors import UnsupportedConfigurationError
from training.attach import RoutedModel
from training.config import SystemSettings
from training.distributed import World, shard_model
from training.language_model import load_language_model

_SHARDED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose sharding is tested."""

_APART = ("layer_idx", "experts", "num_experts")
"""Attributes of modules that attend, carry a state, or choose experts."""


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer."""
    return AutoTokenizer.from_pretrained(model)


def model_limit(model: str) -> int:
    """Return the most tokens of a sequence that a model's config allows."""
    return int(AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings)


def load_routed(
    model: str, sink_tokens: int, window_tokens: int, system: SystemSettings, world: World
) -> RoutedModel:
    """Load a model, frozen, onto this process's device and attach to it.

    Args:
        model: folder or name.
        sink_tokens: of SPARSE attention.
        window_tokens: of SPARSE attention.
        system: dtype, kernel, sharding, recomputation.
        world: this process.

    Returns: RoutedModel.
    Raises: UnsupportedConfigurationError: a model that routers cannot be trained for, or that
        cannot be sharded.
    """
    loaded = load_language_model(model, getattr(torch, system.dtype))
    kernel = system.sparse_kernel
    if kernel == "auto":
        kernel = "flex" if world.device.type == "cuda" else "sdpa"
    if system.shard_model:
        if type(loaded).__name__ not in _SHARDED:
            raise UnsupportedConfigurationError(
                f"expected a model among {sorted(_SHARDED)} with --system.shard_model true, found "
                f"{type(loaded).__name__}; train it with --system.shard_model false"
            )
        loaded.requires_grad_(False)
        shard_model(loaded, world)
    loaded.to(world.device)
    if system.compile_layers:
        compile_layers(loaded)
    routed = RoutedModel(loaded, sink_tokens, window_tokens, kernel)
    if system.checkpoint_layers:
        routed.recompute_activations()
    return routed


def compile_layers(model: Any) -> None:
    """Compile what lies between attention and attention, in place; all layers share the code.

    Attention itself stays out: its policy, hooks and routes differ from layer to layer. So do
    layers with a state, and experts, whose work depends on the tokens.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for part in layer.children():
                if not any(hasattr(inner, name) for inner in part.modules() for name in _APART):
                    part.compile(dynamic=True)
