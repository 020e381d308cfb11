"""Queries that transformers' own code rotated are rotated back.

Oracle: transformers' models of each family: the query that its attention gets, from queries drawn
here and its own cos and sin. That vLLM runs them so: its source, of both versions.
"""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    SmolLM3Config,
)

from flux_vllm.routing.rotary import RotaryInverse
from flux_vllm.startup.transformers_rotary import transformers_rotary
from tests.unit.hooks.test_sources import VERSIONS, package

BY_TRANSFORMERS = ("Arcee", "Glm", "HunYuanDenseV1", "Olmo2", "Olmo3", "Phi", "SeedOss", "SmolLM3")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
BY_KIND = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def attention_of(config: PreTrainedConfig, layer: int) -> tuple[nn.Module, Any]:
    """Give a model as vLLM's holds it, and the attention module of a layer."""
    holder = nn.Module()
    holder.model = AutoModel.from_config(config)
    found = [part for part in holder.modules() if getattr(part, "layer_idx", None) == layer]
    return holder, found[0]


CASES: dict[str, tuple[PreTrainedConfig, int, int, bool]] = {
    "whole": (SmolLM3Config(**SIZES), 0, 16, True),
    "scaled": (LlamaConfig(**SIZES | {"rope_parameters": YARN}), 1, 16, True),
    "linear": (LlamaConfig(**SIZES | {"rope_parameters": LINEAR}), 1, 16, True),
    "interleaved, half": (GlmConfig(**SIZES | {"rope_parameters": PARTIAL}), 0, 8, False),
    "a quarter": (
        GPTNeoXConfig(**SIZES | {"rope_parameters": None, "rotary_pct": 0.25}),
        0,
        4,
        True,
    ),
    "of sliding layers": (Olmo3Config(**SIZES | BY_KIND), 0, 16, True),
    "of full layers": (Olmo3Config(**SIZES | BY_KIND), 1, 16, True),
}


@pytest.mark.parametrize("name", CASES)
def test_rotations_are_undone(name: str) -> None:
    config, layer, rotary_dim, is_neox_style = CASES[name]
    model, attention = attention_of(config, layer)
    rotary = transformers_rotary(model, attention, 16)
    assert rotary is not None
    assert (rotary.rotary_dim, rotary.is_neox_style) == (rotary_dim, is_neox_style)
    # Some past max_position_embeddings, which is no limit of transformers' code.
    places = np.array([0, 3, 100, 255, 256, 900])
    query = torch.randn(len(places), 16)
    kind = {"layer_type": config.layer_types[layer]} if "layers" in name else {}
    cos, sin = model.model.rotary_emb(query, torch.from_numpy(places)[None], **kind)
    apply = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
    rotated, _ = apply(query[None, None], query[None, None], cos, sin)
    inverse = RotaryInverse(rotary, 16, torch.device("cpu"))
    found = inverse.undo(rotated[0, 0], *map(torch.from_numpy, inverse.rows(places)))
    torch.testing.assert_close(found, query, rtol=0, atol=1e-5)
    assert (rotated[0, 0] - query).abs().amax(dim=1)[1:].min() > 0.1


def test_tables_are_told_apart_by_the_kind_of_layer() -> None:
    model, first = attention_of(CASES["of sliding layers"][0], 0)
    second = model.model.layers[1].self_attn
    one, other = (transformers_rotary(model, attention, 16) for attention in (first, second))
    assert one != other
    assert one == transformers_rotary(model, first, 16)
    model, first = attention_of(CASES["whole"][0], 0)
    second = model.model.layers[1].self_attn
    assert len({transformers_rotary(model, at, 16) for at in (first, second)}) == 1


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=64, vocab_size=64),
        Phi3Config(**SIZES | {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
        LlamaConfig(**SIZES | {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}),
    ],
    ids=["no rotation", "frequencies by the batch", "by the longest in the batch"],
)
def test_others_are_not_found(config: PreTrainedConfig) -> None:
    assert transformers_rotary(*attention_of(config, 0), 16) is None


@pytest.mark.vllm
@pytest.mark.parametrize("version", VERSIONS)
def test_vllm_runs_them_by_transformers_own_code(version: str) -> None:
    models = package(version) / "model_executor/models"
    registry = (models / "registry.py").read_text()
    for name in BY_TRANSFORMERS:
        assert f'"{name}ForCausalLM": ("transformers", "TransformersForCausalLM")' in registry
    base = (models / "transformers/base.py").read_text()
    assert 'VLLM_ATTN_ATTR = "attn"' in base
    assert "setattr(attn_module, VLLM_ATTN_ATTR, attn_instance)" in base
