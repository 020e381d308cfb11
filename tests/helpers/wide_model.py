"""Random bfloat16 Llamas of real widths, in shards, and routers fitted to them.

vLLM's dummy weights depend on the shape of a rank's share, so that two ranks would hold another
model than one; files are the same for both. The fit runs the model in transformers on the GPU,
where there is one: the float32 reference would take minutes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.models import (
    _CALIBRATION_LENGTHS,
    _LOGIT_SCALE,
    _QUERY_KEY_SCALE,
    _calibrate,
    _random_router_tensors,
    random_prompt,
)
from tests.helpers.reference_router import ReferenceRouter

POOL_TOKENS = 48


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _matrices(config: LlamaConfig) -> Iterator[dict[str, tuple[tuple[int, ...], float]]]:
    """Give, a file at a time, the shape and scale of each weight; scale 0 stands for ones."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    linear = {
        "self_attn.q_proj": ((queries, hidden), _QUERY_KEY_SCALE),
        "self_attn.k_proj": ((keys, hidden), _QUERY_KEY_SCALE),
        "self_attn.v_proj": ((keys, hidden), 1.0),
        "self_attn.o_proj": ((hidden, queries), 1.0),
        "mlp.gate_proj": ((inner, hidden), 1.0),
        "mlp.up_proj": ((inner, hidden), 1.0),
        "mlp.down_proj": ((hidden, inner), 1.0),
    }
    for layer in range(config.num_hidden_layers):
        file = {name: (shape, scale * shape[1] ** -0.5) for name, (shape, scale) in linear.items()}
        file |= {f"{name}_layernorm": ((hidden,), 0.0) for name in ("input", "post_attention")}
        yield {f"model.layers.{layer}.{name}.weight": entry for name, entry in file.items()}
    yield {
        "model.embed_tokens.weight": ((config.vocab_size, hidden), 1.0),
        "model.norm.weight": ((hidden,), 0.0),
        "lm_head.weight": ((config.vocab_size, hidden), _LOGIT_SCALE * hidden**-0.5),
    }


def write_wide_llama(folder: Path, shape: Path, layers: int, seed: int = 0) -> Path:
    """Write a model of a configuration's widths and fewer layers.

    Args:
        folder: where to write.
        shape: folder whose `config.json` says the widths.
        layers: in place of the configuration's.
        seed: of the weights.
    Returns: Path: the folder.
    """
    config = LlamaConfig.from_pretrained(shape, num_hidden_layers=layers, dtype="bfloat16")
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    config.save_pretrained(folder)
    generator = torch.Generator(_device()).manual_seed(seed)
    index: dict[str, str] = {}
    for number, weights in enumerate(_matrices(config)):
        tensors = {}
        for name, (size, scale) in weights.items():
            tensor = torch.ones(size, device=_device(), dtype=torch.bfloat16)
            if scale:
                tensor.normal_(0.0, scale, generator=generator)
            tensors[name] = tensor.cpu()
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    return folder


def write_fitted_router(
    folder: Path,
    model_folder: Path,
    *,
    sink_tokens: int,
    window_tokens: int,
    gain: float,
    seed: int = 0,
) -> Path:
    """Write a random router fitted to a model all of whose layers are FULL; see `models`."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    model = model.to(_device()).eval()
    config = model.config
    lengths = _CALIBRATION_LENGTHS * 4
    prompts = [
        random_prompt(length, 1_000_000 + seed * 1_000 + i, config.vocab_size)
        for i, length in enumerate(lengths)
    ]
    pooled = torch.stack([_pooled_features(model, prompt) for prompt in prompts])
    del model
    generator = torch.Generator().manual_seed(seed)
    size = config.head_dim
    widths = tuple(factor * size for factor in (8, 2, 4, 1))
    tensors = _random_router_tensors(config.num_hidden_layers, size, widths, generator)
    tensors = _calibrate(tensors, pooled, gain)
    metadata = _metadata(config, sink_tokens, window_tokens)
    path = folder / "flux_router.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def _metadata(config: LlamaConfig, sink_tokens: int, window_tokens: int) -> dict[str, str]:
    return {
        "format_version": "1",
        "base_model": "wide-random",
        "num_layers": str(config.num_hidden_layers),
        "head_dim": str(config.head_dim),
        "pool_tokens": str(POOL_TOKENS),
        "sink_tokens": str(sink_tokens),
        "window_tokens": str(window_tokens),
        "sparse_pattern": "streaming",
        "provenance": "{}",
    }


@torch.inference_mode()
def _pooled_features(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """Pool each layer's queries before RoPE as a probe does. Returns: [layers, d]."""
    router = ReferenceRouter({}, _metadata(model.config, 0, 1))
    positions = router.positions(len(prompt))
    pooled: list[torch.Tensor] = []

    def keep(size: int) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            queries = output[0].float().unflatten(-1, (-1, size)).mean(dim=1)
            ends = torch.cat([queries[:POOL_TOKENS], queries[-POOL_TOKENS:]])
            pooled.append(ends.mean(dim=0).cpu())

        return hook

    hooks = [
        layer.self_attn.q_proj.register_forward_hook(keep(model.config.head_dim))
        for layer in model.model.layers
    ]
    causal = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()
    # Without the head: its logits of all positions are of no use. A gap between positions would
    # pass for packed sequences, were no mask given.
    model.model(
        torch.tensor([[prompt[position] for position in positions]], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        attention_mask=causal[None, None].to(model.device),
        use_cache=False,
    )
    for hook in hooks:
        hook.remove()
    return torch.stack(pooled)
