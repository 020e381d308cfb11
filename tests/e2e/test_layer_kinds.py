"""Layers of several kinds, and weights of another: those of full attention are routed, no others.

Oracles: see tests/helpers/families.py.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    FalconH1Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    NemotronHConfig,
    Olmo3Config,
    Qwen3NextConfig,
    SmolLM3Config,
)

from flux_vllm.errors import UnsupportedConfigurationError
from tests.helpers.families import (
    STATIC,
    Case,
    Family,
    check_fixed_routes,
    check_full,
    check_probes_beside_answers,
    check_router,
    check_training,
    make_case,
    quantized_family,
    start,
)
from tests.helpers.models import write_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


FAMILIES = {
    # Attention and a state space side by side in every layer.
    "falcon-h1": Family(
        FalconH1Config,
        {**MAMBA, "mamba_d_ssm": 256, "mamba_chunk_size": 64},
        routed=(0, 1, 2, 3),
        sparse=(0, 3),
    ),
    "granite-hybrid-rope": Family(
        GraniteMoeHybridConfig,
        {
            **MAMBA,
            "mamba_chunk_size": 64,
            "layer_types": ["mamba", "attention"] * 2,
            "position_embedding_type": "rope",
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
        },
    ),
    # Queries that nothing rotates.
    "nemotron-h": Family(
        NemotronHConfig,
        {
            "layers_block_type": ["mamba", "attention"] * 2,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "ssm_state_size": 16,
            "chunk_size": 64,
        },
    ),
    "qwen3-next": Family(
        Qwen3NextConfig,
        {
            **DELTA_NET,
            # In both: which experts low precision would choose is no matter here.
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
        dtype="bfloat16",
        lengths=(100, 161, 333, 1300),  # its KV blocks are of 1,152 tokens
    ),
    "llama-gptq": quantized_family("gptq"),
    "llama-awq": quantized_family("awq"),
    "llama-w4a16": quantized_family("w4a16"),
    "llama-w8a8-int8": quantized_family("w8a8-int8"),
    "llama-fp8-blocks": quantized_family("fp8-blocks"),
    # Run by transformers' own code, one layer without RoPE; rotary tables by the kind of layer.
    "smollm3": Family(
        SmolLM3Config,
        {"no_rope_layers": [1, 1, 0, 1]},
        routed=(0, 1, 3),
        unrotated=(2,),
        sparse=(0, 3),
    ),
    "olmo3": Family(
        Olmo3Config,
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64},
    ),
    # Layers with a sliding window of their own between those that see everything.
    "gemma3": Family(
        Gemma3TextConfig,
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
            "query_pre_attn_scalar": 32,
        },
    ),
    # Likewise, and the last layers attend to keys of earlier ones.
    "gemma4-shared-kv": Family(
        Gemma4TextConfig,
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
            "num_kv_shared_layers": 2,
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512,
        },
        sparse=(1, 3),
        owners={3: 1},
    ),
    # Sliding windows beside full attention, and learned sinks in both.
    "gpt-oss": Family(
        GptOssConfig,
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
        },
    ),
}


# Others in `make test` are of the same kind.
RARER = (
    "falcon-h1", "granite-hybrid-rope", "gemma3", "olmo3",
    "llama-awq", "llama-w4a16", "llama-w8a8-int8", "llama-fp8-blocks",
)  # fmt: skip


def _marks(name: str) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.long] if name in RARER else []
    if name == "llama-fp8-blocks":
        has_amx = torch.cpu._is_amx_tile_supported()
        reason = "on a CPU, vLLM runs FP8 in blocks by AMX alone (tests/gpu runs it too)"
        marks.append(pytest.mark.skipif(not has_amx, reason=reason))
    return marks


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=_marks(name), id=name) for name in FAMILIES]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(FAMILIES[request.param], tmp_path_factory.mktemp(request.param))


def test_fixed_routes(case: Case) -> None:
    check_fixed_routes(case)


def test_full(case: Case) -> None:
    check_full(case)


@pytest.mark.parametrize(
    "case",
    ["nemotron-h", *(pytest.param(n, marks=pytest.mark.long) for n in ("falcon-h1", "qwen3-next"))],
    indirect=True,
)
def test_probes_leave_running_requests_alone(case: Case) -> None:
    check_probes_beside_answers(case)


def test_router(case: Case) -> None:
    check_router(case)


def test_training(case: Case) -> None:
    check_training(case)


def test_a_probe_attends_to_an_owners_keys(tmp_path: Path) -> None:
    """Routers look at a layer without keys of its own, which those of training never do."""
    pools = {"pools": ["ends:48"], "context_layers": [3], "widths": [64, 32, 32, 32]}
    case = make_case(replace(FAMILIES["gemma4-shared-kv"], looks_at=pools), tmp_path)
    check_router(case, is_trained=False)


def test_a_router_looks_at_a_layer_of_another_rope(tmp_path: Path) -> None:
    """Gemma 3's sliding layers turn by another base than those of full attention."""
    pools = {"pools": ["ends:48"], "context_layers": [0], "widths": [64, 32, 32, 32]}
    case = make_case(replace(FAMILIES["gemma3"], looks_at=pools), tmp_path)
    check_router(case, is_trained=False)


def test_memory_of_sparse_layers_is_not_given_back(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, NemotronHConfig, **FAMILIES["nemotron-h"].config)
    with pytest.raises(UnsupportedConfigurationError, match="attention layers alone"):
        start(tmp_path, FAMILIES["nemotron-h"], STATIC | {"sparse_layers": [3], "free_kv": True})
