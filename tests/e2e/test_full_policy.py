"""Policy `full` gives what vLLM's own CPU backend gives, token for token."""

import pytest

from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt

pytestmark = pytest.mark.vllm


def test_full_equals_cpu_attn(tiny_model):
    prompts = [random_prompt(n, seed=n) for n in (1, 33, 161, 500, 900, 2500)]
    answers = []
    for flux in (None, {"policy": "full"}):
        with Engine(tiny_model, flux, max_num_batched_tokens=256, dtype="bfloat16") as engine:
            if flux is None:
                backend = engine.llm.llm_engine.vllm_config.attention_config.backend
                assert backend is None
            answers.append(engine.generate(prompts, 48))
    for own, ours in zip(*answers, strict=True):
        assert own.tokens == ours.tokens
        assert own.logprobs == ours.logprobs
        assert ours.routes == [1] * 4
