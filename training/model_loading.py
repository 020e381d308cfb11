"""Load a language model and its tokenizer for routing."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training.attach import RoutedModel
from training.config import SystemSettings
from training.distributed import World, shard_model


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer."""
    return AutoTokenizer.from_pretrained(model)


def model_limit(model: str) -> int:
    """Return the most tokens of a sequence that a model's config allows."""
    return int(AutoConfig.from_pretrained(model).max_position_embeddings)


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
    """
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, system.dtype))
    kernel = system.sparse_kernel
    if kernel == "auto":
        kernel = "flex" if world.device.type == "cuda" else "sdpa"
    if system.shard_model:
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

    Attention itself stays out: its policy, hooks and routes differ from layer to layer.
    """
    for layer in model.model.layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=True)
