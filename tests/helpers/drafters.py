"""Tiny random drafters for speculative decoding, written to a folder as vLLM loads them.

What they propose is as good as chance: over a vocabulary of `VOCABULARY` tokens the model accepts
some drafts and refuses most.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from tests.helpers.models import write_tiny_llama, write_tiny_model

VOCABULARY = 8
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 64, 4
SIZES = {"layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
_HIDDEN = HEADS * HEAD_DIM


def write_target(folder: Path, method: str) -> Path:
    """Write the model that `method` drafts for; with `mtp`, its drafter is among its weights."""
    if method != "mtp":
        return write_tiny_llama(folder, vocab_size=VOCABULARY, **SIZES)
    # MiMo is Qwen2 with layers that predict further tokens.
    mimo = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    write_tiny_model(folder, Qwen2Config, vocab_size=VOCABULARY, **SIZES)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | mimo))
    generator = torch.Generator().manual_seed(1)
    tensors = _layer(generator, "model.mtp_layers.0.", _HIDDEN, has_bias=True)
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm", "input_layernorm"):
        tensors[f"model.mtp_layers.0.{name}.weight"] = torch.ones(_HIDDEN)
    tensors["model.mtp_layers.0.input_proj.weight"] = _matrix(generator, _HIDDEN, 2 * _HIDDEN)
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | tensors, weights, {"format": "pt"})
    return folder


def write_drafter(folder: Path, method: str) -> dict[str, Any]:
    """Write what `method` drafts with, unless that is among the model's own weights.

    Returns: vLLM's speculative configuration, three drafts a step.
    """
    config = {"method": method, "num_speculative_tokens": 3}
    if method == "mtp":
        return config
    if method == "draft_model":  # its heads are not the model's
        write_tiny_llama(
            folder, layers=2, heads=4, kv_heads=4, head_dim=64, vocab_size=VOCABULARY, seed=7
        )
    else:
        _write_head(folder, method)
    return config | {"model": str(folder)}


def _write_head(folder: Path, method: str) -> None:
    """Write an EAGLE or EAGLE-3 layer, which shares the model's embeddings and head."""
    write_tiny_llama(folder, vocab_size=VOCABULARY, **SIZES | {"layers": 1})
    config = folder / "config.json"
    taps = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]} if method == "eagle3" else {}
    config.write_text(json.dumps(json.loads(config.read_text()) | taps))
    generator = torch.Generator().manual_seed(1)
    if method == "eagle":
        tensors = _layer(generator, "layers.0.", _HIDDEN)
        tensors["fc.weight"] = _matrix(generator, _HIDDEN, 2 * _HIDDEN)
    else:
        tensors = _layer(generator, "midlayer.", 2 * _HIDDEN)
        tensors["fc.weight"] = _matrix(generator, _HIDDEN, 3 * _HIDDEN)
        for name in ("midlayer.hidden_norm", "midlayer.input_layernorm", "norm"):
            tensors[f"{name}.weight"] = torch.ones(_HIDDEN)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _layer(
    generator: torch.Generator, prefix: str, inputs: int, has_bias: bool = False
) -> dict[str, torch.Tensor]:
    """Draw a decoder layer whose queries, keys and values are made of `inputs` numbers."""
    heads = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    shapes = {f"self_attn.{name}_proj": (size, inputs) for name, size in heads.items()}
    shapes["self_attn.o_proj"] = (_HIDDEN, _HIDDEN)
    shapes |= {f"mlp.{name}_proj": (2 * _HIDDEN, _HIDDEN) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (_HIDDEN, 2 * _HIDDEN)
    tensors = {
        f"{prefix}{name}.weight": _matrix(generator, *shape) for name, shape in shapes.items()
    }
    tensors[f"{prefix}post_attention_layernorm.weight"] = torch.ones(_HIDDEN)
    if has_bias:
        for name, size in heads.items():
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = torch.zeros(size)
    return tensors


def _matrix(generator: torch.Generator, outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
