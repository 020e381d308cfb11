"""Published Flux-Attention checkpoints, made by hand from models that transformers makes.

Names, fields and sizes are those of the authors' `PawLlamaForCausalLM` and `PawQwen3ForCausalLM`
(docs/ROUTE_STATE.md); nothing here comes from `flux_vllm`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

ALLOCATOR = "model.layers.{layer}.self_attn.mask_allocator."
FIELDS: dict[str, Any] = {
    "toggle_type": "streaming",
    "retrieval_mode": "full",
    "local_window_size": 1024,
    "sink_size": 128,
    "pooling_mode": "ctx_q",
    "pool_size": 100,
    "use_softmax": True,
    "triangle_n_last": 128,
    "disable_linear_regularization_term": False,
    "enable_ada_sparsity": True,
    "enable_lambda_task": True,
    "suggested_sparsity": None,
    "use_task_emb_for_mask": False,
}
# Of `tiny_checkpoint`.
LAYERS, HEAD_DIM = 3, 4
_NETWORKS = {"features": "cls_feat_extractor", "head": "cls_router_head_agnostic"}


def router_shapes(head_dim: int, logits: int = 2) -> dict[str, tuple[int, int]]:
    """Give (outputs, inputs) of a layer's linear layers, by the authors' names."""
    d = head_dim
    return {
        "cls_feat_extractor.0": (8 * d, d),
        "cls_feat_extractor.2": (2 * d, 8 * d),
        "cls_router_head_agnostic.0": (4 * d, 2 * d),
        "cls_router_head_agnostic.2": (d, 4 * d),
        "cls_router_head_agnostic.4": (logits, d),
    }


def random_allocators(
    layers: int, head_dim: int, logits: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Draw the routers of a model, by the authors' names."""
    tensors = {}
    for layer in range(layers):
        for name, (outputs, inputs) in router_shapes(head_dim, logits).items():
            prefix = ALLOCATOR.format(layer=layer) + name
            tensors[f"{prefix}.weight"] = torch.randn(outputs, inputs).to(dtype)
            tensors[f"{prefix}.bias"] = torch.randn(outputs).to(dtype)
    return tensors


def allocators(router: Mapping[str, torch.Tensor], use_softmax: bool) -> dict[str, torch.Tensor]:
    """Rename a router file's tensors as the authors do; one logit is the difference of the two."""
    tensors = {}
    for name, tensor in router.items():
        _, layer, network, number, kind = name.split(".")
        if (network, number) == ("head", "4") and not use_softmax:
            tensor = tensor[1:] - tensor[:1]
        prefix = ALLOCATOR.format(layer=layer)
        tensors[f"{prefix}{_NETWORKS[network]}.{number}.{kind}"] = tensor.clone()
    return tensors


def training_leftovers(layers: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Draw what the authors' training keeps in a checkpoint and their inference does not use."""
    tensors = {f"model.sparsity_lambda{i}_task": torch.rand(6) for i in (1, 2)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.self_attn."
        tensors[f"{prefix}attn_mask_log_alphas"] = torch.randn(kv_heads)
        tensors[f"{prefix}mask_allocator.log_temp"] = torch.zeros(())
    return tensors


def tiny_checkpoint(
    folder: Path,
    config_class: Any = LlamaConfig,
    dtype: torch.dtype = torch.float32,
    logits: int = 2,
    router_dtype: torch.dtype | None = None,
    **config: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Make a tiny model; give its configuration and tensors as the authors would store them."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": 40,
        "pad_token_id": None,
    }
    made = config_class(**sizes | config)
    model = AutoModelForCausalLM.from_config(made, dtype=dtype)
    model.save_pretrained(folder / "standard")
    tensors = load_file(folder / "standard" / "model.safetensors")
    tensors |= random_allocators(LAYERS, HEAD_DIM, logits, router_dtype or dtype)
    tensors |= training_leftovers(LAYERS, made.num_key_value_heads)
    return paw_config(folder / "standard", use_softmax=logits == 2), tensors


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], shards: int = 1
) -> Path:
    """Write config.json and the tensors, dealt out to shards in turn so that all kinds mix."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def paw_config(model_folder: Path, **fields: Any) -> dict[str, Any]:
    """Turn a standard model's config.json into the authors'."""
    config = json.loads((model_folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    return config | FIELDS | {"architectures": [f"Paw{architecture}"]} | fields


def write_paw_model(
    folder: Path, model_folder: Path, router_file: Path, shards: int = 3, **fields: Any
) -> Path:
    """Write a standard model and a router file as one published checkpoint."""
    config = paw_config(model_folder, **fields)
    tensors = load_file(model_folder / "model.safetensors")
    tensors |= allocators(load_file(router_file), config["use_softmax"])
    tensors |= training_leftovers(config["num_hidden_layers"], config["num_key_value_heads"])
    return write_checkpoint(folder, config, tensors, shards)
