"""Policy `router` on models whose queries are made otherwise than plain Llama's.

Oracle: tests/helpers/reference.py, transformers' own modelling code of each family in float32.
"""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Glm4Config,
    GlmConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from flux_vllm.errors import UnsupportedConfigurationError
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt, write_random_router, write_tiny_model
from tests.helpers.reference import ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import assert_routed

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen2-bias": (Qwen2Config, {}),
    "qwen3-qk-norm": (Qwen3Config, {}),
    "llama-yarn": (LlamaConfig, {"rope_parameters": YARN, "max_position_embeddings": 4096}),
    "stablelm-partial": (StableLmConfig, {"rope_parameters": PARTIAL, "use_qkv_bias": True}),
    "glm4-partial-interleaved": (Glm4Config, {"rope_parameters": PARTIAL}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_routes_and_outputs(name: str, tmp_path: Path) -> None:
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
    prompts = [random_prompt(length, seed=length) for length in (17, 97, 333, 640, 1000, 2100)]
    with Engine(tmp_path, {}, block_size=BLOCK_SIZE, max_num_batched_tokens=512) as engine:
        answers = [engine.generate([p], 16, prompt_logprobs=True)[0] for p in prompts]
    reference, reference_router = ReferenceModel(tmp_path), ReferenceRouter.load(router)
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
    for answer in answers:
        assert_routed(answer, reference, reference_router, pattern)
    assert len({tuple(answer.routes or ()) for answer in answers}) > 1


def test_transformers_own_code_is_refused(tmp_path: Path) -> None:
    """vLLM has no Glm of its own and runs transformers', where RoPE cannot be seen."""
    write_tiny_model(tmp_path, GlmConfig, layers=2)
    write_random_router(tmp_path, num_layers=2, head_dim=32)
    with pytest.raises(UnsupportedConfigurationError, match="found transformers' GlmAttention"):
        Engine(tmp_path, {})
