"""The configuration of a published Flux-Attention checkpoint: what it says of model and router.

The fields are those of the authors' `PawLlamaConfig` and `PawQwen3Config`, with their defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flux_vllm.errors import CheckpointImportError

# The authors' architecture: that of the standard model, and its model_type.
ARCHITECTURES = {
    "PawLlamaForCausalLM": ("LlamaForCausalLM", "llama"),
    "PawQwen3ForCausalLM": ("Qwen3ForCausalLM", "qwen3"),
}

PATTERNS = {"streaming": "streaming", "triangle": "triangle", "xattn": "xattention"}
"""The authors' `toggle_type` to the `sparse_pattern` of a router file."""

# What the authors' classes take for a field that a config.json lacks. Their default pooling_mode,
# "first_token", is one that their own inference refuses.
_DEFAULTS: dict[str, object] = {
    "toggle_type": "streaming",
    "retrieval_mode": "full",
    "local_window_size": 1024,
    "sink_size": 128,
    "pooling_mode": "first_token",
    "pool_size": 100,
    "use_softmax": False,
    "triangle_n_last": 128,
}
XATTENTION = {
    "xattn_threshold": 0.9,
    "xattn_stride": 16,
    "xattn_norm": 1,
    "threshold": 0.9,
    "stride": 16,
}
"""What `xattn` is served with, by the names that a config.json may have for it."""
# Of their training, or of how their own code runs a model: none changes a decision at batch 1.
_WITHOUT_MEANING = (
    "auto_map",
    "block_size",
    "disable_linear_regularization_term",
    "enable_ada_sparsity",
    "enable_lambda_task",
    "enable_layerwise_sparsity",
    "erank_analysis_path",
    "mask_hard_sample",
    "mask_temp",
    "pooling_seq",
    "suggested_sparsity",
    "suggested_threshold",
    "topk_k",
    "use_batch_routed_attention",
    "use_task_emb_for_mask",
)
_WITHOUT_MEANING_PREFIX = "layerwise_sparsity_"
# Of a standard Llama or Qwen3, beside the sizes that `read_shape` reads.
_STANDARD = {
    "_name_or_path",
    "architectures",
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "pretraining_tp",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
}
# Their sparse kernels count sink and window in blocks of so many tokens, rounded up.
_BLOCK_TOKENS = 128
_MOST_LAYERS, _MOST = 1024, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that give a Llama's or Qwen3's tensors their shapes."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    """Whether the output layer is the embedding's matrix."""
    attention_bias: bool
    mlp_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """How the checkpoint's router looks at a prompt, and what its SPARSE means."""

    sparse_pattern: str
    sink_tokens: int
    window_tokens: int
    pool_tokens: int
    use_softmax: bool
    """Two logits; else one, the log-odds of FULL."""
    fields: Mapping[str, object]
    """The authors' fields as found or by default."""
    by_default: tuple[str, ...]
    """Names of those that the config.json lacks."""


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """Read the standard sizes.

    Raises: CheckpointImportError: another architecture, a missing or impossible size, quantized
        weights, layers with a window of their own.
    """
    architectures = config.get("architectures")
    known = [name for name in ARCHITECTURES if architectures == [name]]
    if not known:
        raise CheckpointImportError(
            f"expected config.json with architectures of one among {list(ARCHITECTURES)}, found "
            f"{architectures!r}; only published Flux-Attention checkpoints are imported, a "
            "standard model needs a router of its own (`python -m training train`)"
        )
    for name in ("quantization_config", "use_sliding_window"):
        if config.get(name):
            raise CheckpointImportError(
                f"expected a checkpoint without {name}, as the published ones are, found "
                f"{name} {config[name]!r}; import one without it"
            )
    num_layers = _size(config, "num_hidden_layers", _MOST_LAYERS)
    _check_layer_types(config.get("layer_types"), num_layers)
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    kv_heads = _size(config, "num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointImportError(
            f"expected num_attention_heads a multiple of num_key_value_heads in config.json, found "
            f"{heads} and {kv_heads}; download the checkpoint again"
        )
    return ModelShape(
        model_type=ARCHITECTURES[known[0]][1],
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        # The authors' rule, whatever the standard model's default is.
        head_dim=hidden // heads if config.get("head_dim") is None else _size(config, "head_dim"),
        vocab_size=_size(config, "vocab_size"),
        tied=_flag(config, "tie_word_embeddings"),
        attention_bias=_flag(config, "attention_bias"),
        mlp_bias=_flag(config, "mlp_bias"),
    )


def read_settings(config: Mapping[str, Any]) -> RouterSettings:
    """Read the authors' fields.

    Raises: CheckpointImportError: a field or value whose meaning is not known or cannot be served.
    """
    fields = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    _expect(fields, "toggle_type", tuple(PATTERNS), "its SPARSE layers are not known here")
    _expect(
        fields,
        "retrieval_mode",
        ("full",),
        "with another one its FULL layers are not exact at prefill, which is not served",
    )
    _expect(
        fields,
        "pooling_mode",
        ("ctx_q",),
        "the router would look at other tokens than the server shows it",
    )
    pattern = PATTERNS[str(fields["toggle_type"])]
    if pattern == "triangle":
        # A router file has no place for it; 128 is what the server takes.
        _expect(fields, "triangle_n_last", (128,), "another length does not fit a router file")
    if pattern == "xattention":
        # No place for these either.
        for name, served in XATTENTION.items():
            if name in config:
                fields[name] = config[name]
                _expect(fields, name, (served,), "another value does not fit a router file")
    return RouterSettings(
        sparse_pattern=pattern,
        sink_tokens=_whole_blocks(_size(fields, "sink_size", least=0)),
        window_tokens=_whole_blocks(_size(fields, "local_window_size")),
        pool_tokens=_size(fields, "pool_size"),
        use_softmax=_flag(fields, "use_softmax"),
        fields=fields,
        by_default=tuple(name for name in fields if name not in config),
    )


def standard_config(
    config: Mapping[str, Any], shape: ModelShape
) -> tuple[dict[str, Any], list[str]]:
    """Make the standard model's config.json, and list the fields that are left out of it."""
    dropped = [name for name in config if _is_authors(name, config)]
    standard = {name: value for name, value in config.items() if name not in dropped}
    architecture, model_type = ARCHITECTURES[config["architectures"][0]]
    return standard | {
        "architectures": [architecture],
        "model_type": model_type,
        "head_dim": shape.head_dim,
    }, dropped


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """List the fields that are neither a standard model's nor known to be the authors'."""
    return sorted(name for name in config.keys() - _STANDARD if not _is_authors(name, config))


def _is_authors(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a field is read here, or is known to have no meaning for serving."""
    if name in XATTENTION:
        # Under another pattern a bare `threshold` may be anything, the router's own for one.
        return name.startswith("xattn_") or config.get("toggle_type") == "xattn"
    return name in _DEFAULTS or name in _WITHOUT_MEANING or name.startswith(_WITHOUT_MEANING_PREFIX)


def _check_layer_types(layer_types: object, num_layers: int) -> None:
    if layer_types is None:
        return
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or not all(isinstance(name, str) for name in layer_types)
    ):
        raise CheckpointImportError(
            f"expected layer_types with a name for each of {num_layers} layers in config.json, "
            f"found {layer_types!r}; download the checkpoint again"
        )
    if set(layer_types) - {"full_attention"}:
        raise CheckpointImportError(
            "expected layer_types of full_attention alone, as the published checkpoints have, "
            f"found {layer_types!r}; a layer with a window of its own has no routes"
        )


def _expect(fields: Mapping[str, object], name: str, values: tuple[object, ...], why: str) -> None:
    if fields[name] not in values:
        raise CheckpointImportError(
            f"expected {name} {' or '.join(map(repr, values))} in config.json, found "
            f"{fields[name]!r}; {why}, so this checkpoint cannot be imported"
        )


def _size(fields: Mapping[str, Any], name: str, most: int = _MOST, least: int = 1) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise CheckpointImportError(
            f"expected a whole number from {least} to {most} as {name} in config.json, found "
            f"{value!r}; download the checkpoint again"
        )
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointImportError(
            f"expected true or false as {name} in config.json, found {value!r}; correct it"
        )
    return value


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS
