"""Tiny random models and routers for the tests, written to a folder, the same for a seed.

Weights are scaled so that attention matters: scores spread widely enough for each query to prefer a
few keys anywhere in its context, so that hiding far keys moves the log-probabilities.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3Config,
    Qwen3VLConfig,
)

from tests.helpers.reference_router import FULL, SPARSE, ReferenceRouter
from tests.helpers.reference_steps import StepModel

# Scores q.k / sqrt(head_dim) get about the square of this as their standard deviation.
_QUERY_KEY_SCALE = 1.6
_LOGIT_SCALE = 3.0
_CALIBRATION_LENGTHS = (40, 130, 260, 520, 900)

_TAKE_IMAGES: dict[str, tuple[type[PreTrainedConfig], str]] = {
    "qwen2": (Qwen2_5_VLConfig, "model."),
    "qwen3": (Qwen3VLConfig, "model.language_model."),
    "qwen3_5_text": (Qwen3_5Config, "model.language_model."),
}
"""Of each text model: the one around it, and what checkpoints of that one call its `model.`."""


def _config_arguments(
    layers: int, heads: int, kv_heads: int, head_dim: int, vocab_size: int, max_positions: int
) -> dict[str, Any]:
    """Collect what all families' configurations call by the same names."""
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * heads * head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _write(folder: str | Path, config: PreTrainedConfig, seed: int) -> Path:
    """Write a model of seeded weights; every matrix keeps its input's scale but for q, k, head."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        with torch.no_grad():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.5, generator=generator)
                continue
            if name.endswith("sinks"):  # a share of most queries' softmax, of some next to all
                weight.normal_(6.0, 2.0, generator=generator)
                continue
            if weight.dim() == 1 or name.endswith("norm.weight"):  # Cohere's are of [heads, dim]
                # q_norm and k_norm set the score's scale where a model has them.
                qk_norm = name.endswith(("q_norm.weight", "k_norm.weight"))
                weight.fill_(_QUERY_KEY_SCALE if qk_norm else 1.0)
                continue
            scale = 1.0 if "embed" in name else weight.shape[1] ** -0.5
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                scale *= _QUERY_KEY_SCALE
            elif name.endswith("lm_head.weight"):
                scale *= _LOGIT_SCALE
            weight.normal_(0.0, scale, generator=generator)
    model.save_pretrained(folder)
    return Path(folder)


def write_tiny_model(
    folder: str | Path,
    config_class: type[PreTrainedConfig],
    *,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocab_size: int = 512,
    max_position_embeddings: int = 8192,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random float32 model without a tokenizer; `config` goes to its `config_class`."""
    common = _config_arguments(
        layers, heads, kv_heads, head_dim, vocab_size, max_position_embeddings
    )
    return _write(folder, config_class(**(common | config)), seed)


def write_tiny_llama(folder: str | Path, **sizes_and_config: Any) -> Path:
    """Write a random Llama; see `write_tiny_model`."""
    return write_tiny_model(folder, LlamaConfig, **sizes_and_config)


def write_tiny_qwen3(folder: str | Path, **sizes_and_config: Any) -> Path:
    """Write a random Qwen3 (q/k norm); see `write_tiny_model`."""
    return write_tiny_model(folder, Qwen3Config, **sizes_and_config)


def round_to_bfloat16(folder: Path) -> None:
    """Rewrite a tiny model's weights in bfloat16: what GPU engines serve, the reference reads."""
    weights = folder / "model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(rounded, weights, {"format": "pt"})


def give_images(folder: Path, exact: Path) -> None:
    """Make a tiny text model that of one that takes images, as checkpoints of it are.

    It has no weights for images: an engine that takes none loads none.

    Args:
        folder: of the model, rewritten.
        exact: where to write the text model as it was.
    """
    exact.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, exact)
    text = json.loads((folder / "config.json").read_text())
    config_class, prefix = _TAKE_IMAGES[text.pop("model_type")]
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    config = config_class(
        text_config=text,
        vision_config=vision | {"out_hidden_size": text["hidden_size"]},
        architectures=[config_class.__name__.replace("Config", "ForConditionalGeneration")],
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    config.save_pretrained(folder)
    named = load_file(exact / "model.safetensors").items()
    inner = {re.sub(r"^model\.", prefix, name): tensor for name, tensor in named}
    save_file(inner, folder / "model.safetensors", {"format": "pt"})


def random_prompt(length: int, seed: int, vocab_size: int = 512) -> list[int]:
    """Draw token ids, uniformly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def _random_router_tensors(
    num_layers: int, inputs: int, widths: Sequence[int], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Draw a router's tensors by checkpoint name."""
    names = ("features.0", "features.2", "head.0", "head.2", "head.4")
    outputs = (*widths, 2)
    shapes = dict(zip(names, zip(outputs, (inputs, *widths), strict=True), strict=True))
    tensors = {}
    for layer in range(num_layers):
        for name, (outputs, inputs) in shapes.items():
            weight = torch.randn(outputs, inputs, generator=generator)
            # SiLU takes about half of the variance, so 1.5 keeps a signal through five layers.
            tensors[f"layers.{layer}.{name}.weight"] = weight * 1.5 * inputs**-0.5
            bias = torch.randn(outputs, generator=generator) * 0.1
            tensors[f"layers.{layer}.{name}.bias"] = bias
    return tensors


def _calibrate(
    tensors: dict[str, torch.Tensor], features: torch.Tensor, gain: float
) -> dict[str, torch.Tensor]:
    """Centre and stretch each layer's logits over sample features [samples, layers, F].

    The inputs' mean and deviation are folded into the first linear layer, so that the network sees
    the difference between prompts and not what they share; the last one's bias and scale then put
    P(FULL) around one half.
    """
    tensors = dict(tensors)
    for layer in range(features.shape[1]):
        prefix = f"layers.{layer}"
        mean, deviation = features[:, layer].mean(dim=0), features[:, layer].std(dim=0)
        if not deviation.any():
            continue  # a layer without attention
        deviation[deviation == 0] = 1  # what these prompts share is left as it is
        weight = tensors[f"{prefix}.features.0.weight"] / deviation
        tensors[f"{prefix}.features.0.weight"] = weight
        tensors[f"{prefix}.features.0.bias"] -= weight @ mean
        logits = ReferenceRouter(tensors, {}).logits(layer, features[:, layer])
        difference = logits[:, FULL] - logits[:, SPARSE]
        scale = gain / difference.std()
        tensors[f"{prefix}.head.4.weight"] *= scale
        tensors[f"{prefix}.head.4.bias"] *= scale
        tensors[f"{prefix}.head.4.bias"][FULL] -= difference.median() * scale
    return tensors


def write_random_router(
    folder: str | Path,
    *,
    num_layers: int,
    head_dim: int,
    pool_tokens: int = 64,
    pool_prefix: bool = True,
    pools: Sequence[str] = (),
    probe: Sequence[int] = (128, 128),
    context_layers: Sequence[int] = (),
    widths: Sequence[int] = (),
    own_weight: float = 1.0,
    sink_tokens: int = 32,
    window_tokens: int = 128,
    seed: int = 0,
    model_folder: str | Path | None = None,
    model: Any = None,
    prompts: Sequence[Sequence[int]] | None = None,
    vocab_size: int = 512,
    gain: float = 1.5,
) -> Path:
    """Write `flux_router.safetensors` whose routes vary from prompt to prompt.

    Args:
        folder: where to write; it may be the model's own folder.
        num_layers: routed layers.
        head_dim: of the model.
        pool_tokens: tokens pooled at an end of the prompt.
        pool_prefix: whether the prompt's first tokens are pooled, beside its latest.
        pools: `KIND:TOKENS` of each pool, in place of the two above.
        probe: tokens of a prompt's head and tail that are run.
        context_layers: whose pools every layer's router sees too.
        widths: outputs of the first four linear layers; default the paper's.
        own_weight: what a layer's own pools weigh beside the context layers'; 0: it reads none.
        sink_tokens: tokens; of the sparse pattern.
        window_tokens: tokens; of the sparse pattern.
        seed: of the weights and the sample prompts.
        model_folder: model whose features the router is fitted to; None leaves it unfitted, and its
            routes may then hardly vary.
        model: the reference that computes these; default a StepModel of that folder.
        prompts: sample prompts to fit it to; default random ones of 40 to 900 tokens.
        vocab_size: of the random sample prompts.
        gain: standard deviation of the logits' difference over the sample prompts.
    Returns: Path: the file.
    """
    generator = torch.Generator().manual_seed(seed)
    named = {"pools": pools, "context_layers": context_layers, "widths": widths}
    vectors = max(1, len(pools)) * (1 + len(context_layers))
    paper = tuple(factor * head_dim for factor in (8, 2, 4, 1))
    tensors = _random_router_tensors(num_layers, vectors * head_dim, widths or paper, generator)
    own = max(1, len(pools)) * head_dim
    for layer in range(num_layers):
        tensors[f"layers.{layer}.features.0.weight"][:, :own] *= own_weight
    metadata = {
        "format_version": "2" if any(named.values()) else "1",
        "probe": json.dumps(list(probe)),
        **{name: json.dumps(list(values)) for name, values in named.items() if values},
        "base_model": "tiny-random" if model_folder is None else Path(model_folder).name,
        "num_layers": str(num_layers),
        "head_dim": str(head_dim),
        "pool_tokens": str(pool_tokens),
        "pool_prefix": str(pool_prefix).lower(),
        "sink_tokens": str(sink_tokens),
        "window_tokens": str(window_tokens),
        "sparse_pattern": "streaming",
        "provenance": "{}",
    }
    if model_folder is not None:
        if prompts is None:
            lengths = _CALIBRATION_LENGTHS * 6
            prompts = [
                random_prompt(length, 1_000_000 + seed * 1_000 + i, vocab_size)
                for i, length in enumerate(lengths)
            ]
        raw, model = ReferenceRouter(tensors, metadata), model or StepModel(model_folder)
        features = torch.stack([raw.features(model, prompt) for prompt in prompts])
        tensors = _calibrate(tensors, features, gain)
    path = Path(folder) / "flux_router.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, str(path), metadata)
    return path


def write_bfloat16_llama(
    folder: Path, *, head_dim: int, sink_tokens: int, window_tokens: int, gain: float = 1.5
) -> tuple[Path, Path]:
    """Write what GPU engines serve: a tiny Llama in bfloat16, and a router fitted to it.

    Args:
        folder: where to write each in a folder of its own.
        head_dim: of the model.
        sink_tokens: of the router.
        window_tokens: of the router.
        gain: see `write_random_router`.
    Returns: the model's folder, and the router's.
    """
    model = write_tiny_llama(folder / "model", heads=8, kv_heads=2, head_dim=head_dim)
    round_to_bfloat16(model)
    router = write_random_router(
        folder / "router",
        num_layers=4,
        head_dim=head_dim,
        pool_tokens=48,
        sink_tokens=sink_tokens,
        window_tokens=window_tokens,
        model_folder=model,
        gain=gain,
    )
    return model, router.parent
