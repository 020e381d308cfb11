"""Policy `router` on models whose queries are made otherwise than plain Llama's.

Oracle: tests/helpers/reference.py, transformers' own modelling code of each family in float32.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    ArceeConfig,
    Cohere2Config,
    CohereConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    StableLmConfig,
)

from flux_vllm.errors import UnsupportedConfigurationError
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt, write_random_router, write_tiny_model
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import assert_routed, assert_same, replay
from tests.helpers.training_side import check_training_decides_alike, check_training_runs
from tests.helpers.whole_reference import WholeModel

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# Each with the factors that its own checkpoints have, of a size for these weights.
GRANITE = {
    "attention_multiplier": 32**-0.5,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.8,
    "logits_scaling": 1.5,
}
COHERE = {"tie_word_embeddings": True, "logit_scale": 0.1875}
# Full attention without RoPE in every layer.
COHERE2 = COHERE | {"layer_types": ["full_attention"] * 4}

# Every token goes to all: which ones rounding would choose between equals is no matter here.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen2-bias": (Qwen2Config, {}),
    "qwen3-qk-norm": (Qwen3Config, {}),
    "llama-yarn": (LlamaConfig, {"rope_parameters": YARN, "max_position_embeddings": 4096}),
    "stablelm-partial": (StableLmConfig, {"rope_parameters": PARTIAL, "use_qkv_bias": True}),
    "glm4-partial-interleaved": (Glm4Config, {"rope_parameters": PARTIAL}),
    "granite": (GraniteConfig, GRANITE),
    "qwen3-moe": (Qwen3MoeConfig, EXPERTS | {"moe_intermediate_size": 64}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 4}),
    "cohere": (CohereConfig, COHERE),
    # These vLLM runs by transformers' own code.
    "arcee": (ArceeConfig, {}),
    "seed-oss": (SeedOssConfig, {}),
    "glm-partial-interleaved": (GlmConfig, {"rope_parameters": PARTIAL}),
    "olmo2-qk-norm": (Olmo2Config, {}),
    "cohere-qk-norm": (CohereConfig, COHERE | {"use_qk_norm": True}),
}
STATIC = {
    "policy": "static",
    "sparse_layers": [0, 2],
    "sink_tokens": SINK_TOKENS,
    "window_tokens": WINDOW_TOKENS,
}


# The long one is past what YaRN's model was trained for.
LENGTHS = [17, 97, 333, 640, 1000]
LONG = pytest.param([333, 640, 2100], marks=pytest.mark.long, id="long")


RARER = ("seed-oss", "olmo2-qk-norm", "mixtral", "cohere", "qwen3-qk-norm")
"""Others in `make test` are of the same kind."""


@pytest.mark.parametrize("lengths", [pytest.param(LENGTHS, id="short"), LONG])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in RARER else (), id=name)
        for name in FAMILIES
    ],
)
def test_routes_and_outputs(name: str, lengths: list[int], tmp_path: Path) -> None:
    config_class, config = FAMILIES[name]
    write_tiny_model(tmp_path, config_class, **config)
    router = write_random_router(
        tmp_path,
        num_layers=4,
        head_dim=32,
        pool_tokens=48,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=tmp_path,
    )
    prompts = [random_prompt(length, seed=length) for length in lengths]
    with Engine(tmp_path, {}, block_size=BLOCK_SIZE, max_num_batched_tokens=512) as engine:
        answers = [engine.generate([p], 16, prompt_logprobs=True)[0] for p in prompts]
        check_training_decides_alike(engine, answers, tmp_path, router, range(4))
    reference, reference_router = ReferenceModel(tmp_path), ReferenceRouter.load(router)
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
    for answer in answers:
        assert_routed(answer, reference, reference_router, pattern)
    assert len({tuple(answer.routes or ()) for answer in answers}) > 1


# One of each kind of RoPE, norm and feed-forward in `make test`; all in `make test-all`.
TRAINED = ("qwen2-bias", "glm4-partial-interleaved", "qwen3-moe", "cohere-qk-norm", "arcee")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in TRAINED else pytest.mark.long, id=name)
        for name in FAMILIES
    ],
)
def test_training(name: str, tmp_path: Path) -> None:
    config_class, config = FAMILIES[name]
    write_tiny_model(tmp_path, config_class, **config)
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
    check_training_runs(tmp_path, WholeModel(tmp_path), range(4), [0, 2], pattern)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("granite", marks=pytest.mark.long),
        "cohere2-without-rope",
        pytest.param("cohere", marks=pytest.mark.long),
        pytest.param("cohere-qk-norm", marks=pytest.mark.long),
    ],
)
def test_fixed_policies(name: str, tmp_path: Path) -> None:
    """`full` is vLLM's own answer, `static` the reference's; neither asks for RoPE."""
    config_class, config = (FAMILIES | {"cohere2-without-rope": (Cohere2Config, COHERE2)})[name]
    write_tiny_model(tmp_path, config_class, **config)
    prompts = [random_prompt(length, seed=length) for length in (17, 161, 640, 1100)]
    answers = {}
    for policy, flux in {"stock": None, "full": {"policy": "full"}, "static": STATIC}.items():
        with Engine(tmp_path, flux, block_size=BLOCK_SIZE, max_num_batched_tokens=512) as engine:
            answers[policy] = engine.generate(prompts, 16, prompt_logprobs=True)
    for own, ours in zip(answers["stock"], answers["full"], strict=True):
        assert own.tokens == ours.tokens
        assert own.logprobs == ours.logprobs
        assert own.prompt_logprobs == ours.prompt_logprobs
    reference = ReferenceModel(tmp_path)
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
    for answer in answers["static"]:
        assert_same(answer, replay(reference, answer, pattern, [SPARSE, FULL] * 2))
    assert answers["static"][-1].prompt_logprobs != answers["full"][-1].prompt_logprobs


def test_rope_beside_sliding_windows_alone_is_refused(tmp_path: Path) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
    write_tiny_model(tmp_path, Cohere2Config, **COHERE2 | kinds)
    write_random_router(tmp_path, num_layers=4, head_dim=32)
    with pytest.raises(UnsupportedConfigurationError, match="found none in Cohere2?ForCausalLM"):
        Engine(tmp_path, {})


def test_queries_normalized_after_rope_are_refused(tmp_path: Path) -> None:
    """vLLM runs HunYuan by transformers' own code."""
    write_tiny_model(tmp_path, HunYuanDenseV1Config, layers=2)
    write_random_router(tmp_path, num_layers=2, head_dim=32)
    with pytest.raises(
        UnsupportedConfigurationError, match=r"found `.*query_layernorm.*` after it"
    ):
        Engine(tmp_path, {})
