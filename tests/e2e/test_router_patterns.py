"""A router file that names its sparse pattern: requests are served under it.

Oracle: tests/helpers/reference.py, whose masks are written from the patterns' definitions.
"""

import dataclasses

import pytest

from flux_vllm.router.checkpoint import read_router, write_router
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt
from tests.helpers.reference import SPARSE, SparsePattern
from tests.helpers.replay import assert_routed

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("kind", ["triangle", "xattention"])
def test_router_file_says_the_pattern(tiny_model, reference, reference_router, kind, tmp_path):
    router, info = read_router(tiny_model)
    file = write_router(tmp_path, router, dataclasses.replace(info, sparse_pattern=kind))
    with Engine(
        tiny_model, {"router": str(file)}, block_size=32, max_num_batched_tokens=300
    ) as engine:
        prompts = [random_prompt(length, seed=length) for length in (257, 500, 1100)]
        answers = engine.generate(prompts, 24, prompt_logprobs=True)
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 32, kind)
    for answer in answers:
        assert_routed(answer, reference, reference_router, pattern)
    assert any(SPARSE in answer.routes for answer in answers)


def test_router_file_says_the_answers_first_tokens(
    tiny_model, reference, reference_router, tmp_path
):
    """And the operator, that prompts are SPARSE in every layer: routes are of decode then."""
    router, info = read_router(tiny_model)
    info = dataclasses.replace(info, sparse_pattern="triangle", full_decode_tokens=7)
    flux = {"router": str(write_router(tmp_path, router, info)), "sparse_prefill": True}
    # One prompt is routed in decode alone, once it outgrows sinks and window.
    prompts = [random_prompt(length, seed=length) for length in (150, 257, 500, 1100)]
    with Engine(tiny_model, flux, block_size=32, max_num_batched_tokens=300) as engine:
        answers = engine.generate(prompts, 24, prompt_logprobs=True)
    phases = {"full_decode_tokens": 7, "sparse_prefill": True}
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 32, "triangle", **phases)
    for answer in answers:
        assert_routed(answer, reference, reference_router, pattern)
    assert any(SPARSE in answer.routes for answer in answers)
