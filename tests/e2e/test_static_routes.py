"""Policy `static` on a real engine against transformers in float32.

Oracle: tests/helpers/reference.py. Covers the kernel path of FULL rows, compacted decode, exact
SPARSE prefill at any chunk offset, batches, the prefix cache, and preemption.
"""

import pytest

from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt
from tests.helpers.reference import FULL, SPARSE, SparsePattern
from tests.helpers.replay import assert_same, logprob_errors, replay

pytestmark = pytest.mark.vllm

ROUTES = [SPARSE, FULL, SPARSE, FULL]
FLUX = {
    "policy": "static",
    "sparse_layers": [0, 2],
    "sink_tokens": SINK_TOKENS,
    "window_tokens": WINDOW_TOKENS,
}
# Around sink + window = 160, then unaligned, then long.
LENGTHS = [159, 160, 161, 500, 1100, 3001]
BLOCK_SIZES = [32, 128]


def _pattern(block_size):
    return SparsePattern(SINK_TOKENS, WINDOW_TOKENS, block_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("chunk", [4096, 256, 97], ids=["one-chunk", "chunks-256", "chunks-97"])
def test_static_equals_reference(tiny_model, reference, block_size, chunk, record_property):
    worst = [0.0, 0.0]
    with Engine(tiny_model, FLUX, block_size=block_size, max_num_batched_tokens=chunk) as engine:
        for length in LENGTHS:
            # 200 decoded tokens cross several block edges; once is enough.
            tokens = 200 if (length, chunk) == (500, 4096) else 24
            prompt = random_prompt(length, seed=length)
            (answer,) = engine.generate([prompt], tokens, prompt_logprobs=True)
            assert max(step[1] for step in answer.steps) == min(chunk, length)
            request = replay(reference, answer, _pattern(block_size), ROUTES)
            assert_same(answer, request)
            worst = list(map(max, worst, logprob_errors(answer, request)))
    record_property("worst_prompt_logprob_error", worst[0])
    record_property("worst_output_logprob_error", worst[1])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_eight_requests_in_one_batch(tiny_model, reference, block_size, record_property):
    lengths = [159, 160, 161, 500, 1100, 3001, 17, 290]
    prompts = [random_prompt(length, seed=10 + length) for length in lengths]
    # 512 tokens a step: prompts in chunks run beside others' decodes.
    with Engine(tiny_model, FLUX, block_size=block_size, max_num_batched_tokens=512) as engine:
        answers = engine.generate(prompts, 24, prompt_logprobs=True)
    worst = [0.0, 0.0]
    for answer in answers:
        request = replay(reference, answer, _pattern(block_size), ROUTES)
        assert_same(answer, request)
        worst = list(map(max, worst, logprob_errors(answer, request)))
    record_property("worst_prompt_logprob_error", worst[0])
    record_property("worst_output_logprob_error", worst[1])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_prefix_cache_hit(tiny_model, reference, block_size, record_property):
    worst = 0.0
    with Engine(tiny_model, FLUX, block_size=block_size, enable_prefix_caching=True) as engine:
        for length in LENGTHS:
            prompt = random_prompt(length, seed=20 + length)
            (first,) = engine.generate([prompt], 24)
            (second,) = engine.generate([prompt + random_prompt(40, seed=length)], 24)
            assert second.cached_tokens == length // block_size * block_size
            source = replay(reference, first, _pattern(block_size), ROUTES).history
            request = replay(reference, second, _pattern(block_size), ROUTES, history=source)
            assert_same(second, request)
            worst = max(worst, logprob_errors(second, request)[1])
    record_property("worst_output_logprob_error", worst)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_preemption(tiny_model, reference, block_size, record_property):
    prompts = [random_prompt(length, seed=30 + length) for length in (500, 161, 700, 1100)]
    bytes_per_block = 4 * 2 * 2 * 32 * 4 * block_size  # layers, k and v, KV heads, dim, float32
    # All prompts fit, their generations do not. One block is vLLM's null block.
    blocks = sum(-(-len(prompt) // block_size) for prompt in prompts) + 3
    with Engine(
        tiny_model,
        FLUX,
        block_size=block_size,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=blocks * bytes_per_block,
    ) as engine:
        answers = engine.generate(prompts, 200)
    assert sum(answer.preemptions for answer in answers) > 0
    worst = 0.0
    for answer in answers:
        request = replay(reference, answer, _pattern(block_size), ROUTES)
        assert_same(answer, request)
        worst = max(worst, logprob_errors(answer, request)[1])
    record_property("worst_output_logprob_error", worst)


def test_wrong_routes_would_show(reference):
    """The tolerance is tight enough: one route changed moves the log-probabilities."""
    prompt = random_prompt(500, seed=500)
    pattern = _pattern(32)
    right = reference.run(prompt, pattern=pattern, routes=ROUTES, num_decode=4)
    for layer in range(4):
        wrong_routes = [1 - r if i == layer else r for i, r in enumerate(ROUTES)]
        wrong = reference.run(prompt, pattern=pattern, routes=wrong_routes, num_decode=4)
        difference = (right.prompt_logprobs - wrong.prompt_logprobs)[1:].abs().max()
        assert difference > 0.1


@pytest.mark.parametrize(("dtype", "cache"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_kv_cache_of_another_dtype(tiny_model, reference, dtype, cache, record_property):
    """vLLM's CPU kernels keep the model's dtype in it, so it is the same to the last bit.

    What low precision costs is told by policy `full`, which is vLLM's own answer.
    """
    prompts = [random_prompt(length, seed=length) for length in (161, 500, 1100)]

    def answers(flux, kv_cache_dtype):
        arguments = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "block_size": 32}
        with Engine(tiny_model, flux, max_num_batched_tokens=256, **arguments) as engine:
            return engine.generate(prompts, 16, prompt_logprobs=True)

    worst = {}
    for flux, other, routes in (
        (FLUX, (FLUX, "auto"), ROUTES),
        ({"policy": "full"}, (None, cache), [FULL] * 4),
    ):
        errors = []
        for answer, same in zip(answers(flux, cache), answers(*other), strict=True):
            assert answer.tokens == same.tokens
            assert answer.logprobs == same.logprobs
            assert answer.prompt_logprobs == same.prompt_logprobs
            request = replay(reference, answer, _pattern(32), routes, follow_tokens=True)
            errors += logprob_errors(answer, request)
        worst[flux["policy"]] = max(errors)
        record_property(f"worst_logprob_error_{flux['policy']}", max(errors))
    assert worst["static"] < 2 * worst["full"]
