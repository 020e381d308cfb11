"""Which layers of transformers' models get a route, and which models are refused, by name.

Oracle: each model's configuration, read here by hand. That features and routes are the server's is
tested with a server (tests/e2e/test_families.py, tests/e2e/test_layer_kinds.py).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    Ministral3Config,
    PreTrainedConfig,
    SmolLM3Config,
)

from flux_vllm.errors import UnsupportedConfigurationError
from training.attach import RoutedModel
from training.attention_layers import find_attention_layers

SINK, WINDOW = 4, 16
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}
KINDS = ["sliding_attention", "full_attention"] * 2
SLIDING = {"layer_types": KINDS, "sliding_window": 16}


def make(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_sliding_layers_have_no_route() -> None:
    model = make(Gemma3TextConfig(**SIZES | SLIDING))
    layers = find_attention_layers(model)
    assert [(layer.number, layer.window, layer.rotates) for layer in layers] == [
        (0, 16, True),
        (1, None, True),
        (2, 16, True),
        (3, None, True),
    ]
    routed = RoutedModel(model, SINK, WINDOW)
    assert (routed.layers.numbers, routed.layers.total, routed.num_layers) == ((1, 3), 4, 2)


def test_layers_without_rope_beside_others_have_no_route() -> None:
    model = make(SmolLM3Config(**SIZES | {"no_rope_layers": [1, 1, 0, 1], "bos_token_id": None}))
    assert [layer.rotates for layer in find_attention_layers(model)] == [True, True, False, True]
    assert RoutedModel(model, SINK, WINDOW).layers.numbers == (0, 1, 3)


def test_a_model_without_any_rope_is_routed_throughout() -> None:
    model = make(GPT2Config(n_layer=3, n_head=2, n_embd=16, n_positions=64, vocab_size=64))
    routed = RoutedModel(model, SINK, WINDOW)
    assert (routed.layers.numbers, routed.head_dim) == ((0, 1, 2), 8)


def test_learned_sinks_are_found() -> None:
    model = make(
        GptOssConfig(**SIZES | SLIDING | {"num_local_experts": 2, "num_experts_per_tok": 2})
    )
    layers = find_attention_layers(model)
    assert [(layer.window, layer.has_sinks) for layer in layers] == [(16, True), (None, True)] * 2


def test_layers_that_share_keys_take_their_owners_route() -> None:
    shared = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0, "global_head_dim": 16}
    model = make(Gemma4TextConfig(**SIZES | SLIDING | shared))
    assert [layer.owner for layer in find_attention_layers(model)] == [0, 1, 0, 1]
    routed = RoutedModel(model, SINK, WINDOW)
    assert (routed.layers.numbers, routed.head_dim) == ((1,), 16)
    places = [layer.self_attn.flux_layer.place for layer in model.model.layers]
    assert places == [None, 0, None, 0]


LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 4,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
# Scores by position: what llama_4_scaling does to queries beyond the first 64.
SCALED = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.5,
}
REFUSED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], str]] = {
    "softcap": (Gemma2Config, SLIDING, "scores as they are in Gemma2ForCausalLM, found softcap="),
    "latent attention": (DeepseekV3Config, LATENT, "a key and a value of the query's size"),
    "chunks": (
        Llama4TextConfig,
        {"attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 64},
        "causal or sliding-window attention in Llama4ForCausalLM",
    ),
    "a temperature": (
        Ministral3Config,
        {"rope_parameters": SCALED, "sliding_window": None},
        "queries that depend on the position by",
    ),
    "RoPE in windows alone": (Cohere2Config, SLIDING, "RoPE in layers with full attention"),
    "ALiBi": (BloomConfig, {}, "found none"),
    "an encoder": (BertConfig, {}, "causal attention of numbered layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name: str) -> None:
    config_class, config, message = REFUSED[name]
    model = make(config_class(**SIZES | config))
    former = model.config._attn_implementation
    with pytest.raises(UnsupportedConfigurationError, match=message):
        RoutedModel(model, SINK, WINDOW)
    assert model.config._attn_implementation == former


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_windows_alone_are_refused(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(
        family,
        sliding_window=32,
        **({"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}),
    )
    with pytest.raises(UnsupportedConfigurationError, match="sliding_window=32 in all of them"):
        RoutedModel(model, SINK, WINDOW)
