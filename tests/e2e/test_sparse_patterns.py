"""The other sparse patterns on a real engine against transformers in float32.

Oracle: tests/helpers/reference.py, whose masks are written from the patterns' definitions. Covers
chunks at odd offsets (a chunk edge within a query block, within a prompt's tail), batches of
prompts and decodes, and the prefix cache.
"""

import dataclasses

import pytest

from flux_vllm.router.checkpoint import read_router, write_router
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt
from tests.helpers.reference import FULL, SPARSE, SparsePattern
from tests.helpers.replay import assert_routed, assert_same, logprob_errors, replay

pytestmark = pytest.mark.vllm

KINDS = ["triangle", "xattention"]
ROUTES = [SPARSE, FULL, SPARSE, FULL]
BLOCK_SIZE = 32
# Around two blocks of 128 and sink + window = 160, then unaligned, then long.
LENGTHS = [160, 161, 255, 257, 500, 1100, 2001]


def _flux(kind: str) -> dict:
    return {
        "policy": "static",
        "sparse_layers": [0, 2],
        "sink_tokens": SINK_TOKENS,
        "window_tokens": WINDOW_TOKENS,
        "sparse_pattern": kind,
    }


def _pattern(kind: str) -> SparsePattern:
    return SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [4096, 97], ids=["one-chunk", "chunks-97"])
def test_static_equals_reference(tiny_model, reference, kind, chunk, record_property):
    worst = [0.0, 0.0]
    with Engine(
        tiny_model, _flux(kind), block_size=BLOCK_SIZE, max_num_batched_tokens=chunk
    ) as engine:
        for length in LENGTHS:
            prompt = random_prompt(length, seed=length)
            (answer,) = engine.generate([prompt], 24, prompt_logprobs=True)
            assert max(step[1] for step in answer.steps) == min(chunk, length)
            request = replay(reference, answer, _pattern(kind), ROUTES)
            assert_same(answer, request)
            worst = list(map(max, worst, logprob_errors(answer, request)))
    record_property("worst_prompt_logprob_error", worst[0])
    record_property("worst_output_logprob_error", worst[1])


@pytest.mark.parametrize("kind", KINDS)
def test_requests_in_one_batch(tiny_model, reference, kind, record_property):
    prompts = [random_prompt(length, seed=10 + length) for length in (*LENGTHS, 17)]
    # 512 tokens a step: prompts in chunks run beside others' decodes.
    with Engine(
        tiny_model, _flux(kind), block_size=BLOCK_SIZE, max_num_batched_tokens=512
    ) as engine:
        answers = engine.generate(prompts, 24, prompt_logprobs=True)
    worst = [0.0, 0.0]
    for answer in answers:
        request = replay(reference, answer, _pattern(kind), ROUTES)
        assert_same(answer, request)
        worst = list(map(max, worst, logprob_errors(answer, request)))
    record_property("worst_prompt_logprob_error", worst[0])
    record_property("worst_output_logprob_error", worst[1])


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_cache_hit(tiny_model, reference, kind, record_property):
    worst = 0.0
    with Engine(
        tiny_model, _flux(kind), block_size=BLOCK_SIZE, enable_prefix_caching=True
    ) as engine:
        for length in LENGTHS:
            prompt = random_prompt(length, seed=20 + length)
            (first,) = engine.generate([prompt], 24)
            (second,) = engine.generate([prompt + random_prompt(190, seed=length)], 24)
            assert second.cached_tokens == length // BLOCK_SIZE * BLOCK_SIZE
            source = replay(reference, first, _pattern(kind), ROUTES).history
            request = replay(reference, second, _pattern(kind), ROUTES, history=source)
            assert_same(second, request)
            worst = max(worst, logprob_errors(second, request)[1])
    record_property("worst_output_logprob_error", worst)


@pytest.mark.parametrize("kind", KINDS)
def test_preemption(tiny_model, reference, kind, record_property):
    """Text that is computed again lies past the prompt, where triangle's tail goes on."""
    prompts = [random_prompt(length, seed=30 + length) for length in (500, 161, 700, 1100)]
    bytes_per_block = 4 * 2 * 2 * 32 * 4 * BLOCK_SIZE  # layers, k and v, KV heads, dim, float32
    # All prompts fit, their generations do not. One block is vLLM's null block.
    blocks = sum(-(-len(prompt) // BLOCK_SIZE) for prompt in prompts) + 3
    with Engine(
        tiny_model,
        _flux(kind),
        block_size=BLOCK_SIZE,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=blocks * bytes_per_block,
    ) as engine:
        answers = engine.generate(prompts, 100)
    assert sum(answer.preemptions for answer in answers) > 0
    worst = 0.0
    for answer in answers:
        request = replay(reference, answer, _pattern(kind), ROUTES)
        assert_same(answer, request)
        worst = max(worst, logprob_errors(answer, request)[1])
    record_property("worst_output_logprob_error", worst)


@pytest.mark.parametrize("kind", KINDS)
def test_router_file_says_the_pattern(tiny_model, reference, reference_router, kind, tmp_path):
    router, info = read_router(tiny_model)
    file = write_router(tmp_path, router, dataclasses.replace(info, sparse_pattern=kind))
    with Engine(
        tiny_model, {"router": str(file)}, block_size=BLOCK_SIZE, max_num_batched_tokens=300
    ) as engine:
        prompts = [random_prompt(length, seed=length) for length in (257, 500, 1100)]
        answers = engine.generate(prompts, 24, prompt_logprobs=True)
    for answer in answers:
        assert_routed(answer, reference, reference_router, _pattern(kind))
    assert any(SPARSE in answer.routes for answer in answers)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_in_its_place_would_show(reference, kind):
    """The tolerance is tight enough: the pattern moves the log-probabilities."""
    prompt = random_prompt(1100, seed=1100)
    right, wrong = (
        reference.run(prompt, pattern=_pattern(name), routes=ROUTES, num_decode=4)
        for name in (kind, "streaming")
    )
    assert (right.prompt_logprobs - wrong.prompt_logprobs)[1:].abs().max() > 0.1
