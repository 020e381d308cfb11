"""Policy `router` on a real engine against routes and outputs computed from transformers' queries.

Oracle: tests/helpers/reference.py, which pools the queries that transformers' own layers make and
replays the engine's cache history. The random router's routes vary from prompt to prompt.
"""

import pytest

from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt, write_random_router
from tests.helpers.reference import ReferenceRouter, SparsePattern
from tests.helpers.replay import assert_routed

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
PATTERN = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
# 1 to 17: around a granule of 16 positions; 320 and 640: the prompt ends at a block's edge.
LENGTHS = [1, 15, 16, 17, 40, 95, 96, 97, 160, 161, 320, 333, 640, 1000, 2100]


def _check(answer, reference, router, history=None, threshold=0.5):
    return assert_routed(answer, reference, router, PATTERN, history, threshold)


@pytest.mark.parametrize("chunk", [4096, 128, 61], ids=["one-chunk", "chunks-128", "chunks-61"])
def test_routes_and_outputs(tiny_model, reference, reference_router, chunk):
    with Engine(
        tiny_model, {}, block_size=BLOCK_SIZE, max_num_batched_tokens=chunk, max_num_seqs=8
    ) as engine:
        answers = [
            engine.generate([random_prompt(length, seed=length)], 24, prompt_logprobs=True)[0]
            for length in LENGTHS
        ]
    for answer in answers:
        _check(answer, reference, reference_router)
    routes = {tuple(answer.routes) for answer in answers}
    assert len(routes) > 4, "the router under test must not decide alike for all prompts"


def test_one_token_tail_is_prefill(tiny_model, reference, reference_router):
    """A prompt whose last chunk is one token looks like a decode row and is none."""
    with Engine(tiny_model, {}, block_size=BLOCK_SIZE, max_num_batched_tokens=128) as engine:
        for length in (129, 257, 513):
            (answer,) = engine.generate([random_prompt(length, seed=length)], 24)
            assert answer.steps[-24][1:] == (1, "prefill")
            _check(answer, reference, reference_router)


@pytest.mark.parametrize("chunk", [4096, 100], ids=["one-chunk", "chunks-100"])
def test_prefix_hit(tiny_model, reference, reference_router, chunk):
    with Engine(
        tiny_model,
        {},
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=chunk,
        enable_prefix_caching=True,
    ) as engine:
        for length, tail in ((64, 1), (96, 33), (333, 20), (500, 300), (1000, 64)):
            prompt = random_prompt(length, seed=length + 1)
            longer = prompt + random_prompt(tail, seed=tail)
            first, second = (engine.generate([p], 24)[0] for p in (prompt, longer))
            assert second.cached_tokens == length // BLOCK_SIZE * BLOCK_SIZE
            source = _check(first, reference, reference_router).history
            _check(second, reference, reference_router, history=source)


def test_router_of_the_latest_tokens_alone(tiny_model, reference, tmp_path):
    """Chunks, and prefixes and generated text found in the cache; the file says `pool_prefix`."""
    path = write_random_router(
        tmp_path,
        num_layers=4,
        head_dim=32,
        pool_tokens=16,
        pool_prefix=False,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=tiny_model,
    )
    router = ReferenceRouter.load(path)
    assert not router.pool_prefix
    routes = set()
    with Engine(
        tiny_model,
        {"router": str(path)},
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=100,
        enable_prefix_caching=True,
    ) as engine:
        for length, generated in ((1, 1), (17, 20), (97, 40), (320, 70), (1000, 24)):
            prompt = random_prompt(length, seed=length + 3)
            (first,) = engine.generate([prompt], generated)
            turn = prompt + first.tokens + random_prompt(9, seed=generated)
            (second,) = engine.generate([turn], 24)
            source = _check(first, reference, router).history
            _check(second, reference, router, history=source)
            routes |= {tuple(first.routes), tuple(second.routes)}
    assert len(routes) > 3


def test_second_turn(tiny_model, reference, reference_router):
    """The prefix cache holds generated tokens too, whose queries are in no sum."""
    with Engine(tiny_model, {}, block_size=BLOCK_SIZE, enable_prefix_caching=True) as engine:
        for length, generated in ((40, 70), (90, 200), (600, 100)):
            prompt = random_prompt(length, seed=length + 2)
            (first,) = engine.generate([prompt], generated)
            turn = prompt + first.tokens + random_prompt(50, seed=generated)
            (second,) = engine.generate([turn], 24)
            # The last generated token is sampled and never computed.
            computed = length + generated - 1
            assert second.cached_tokens == computed // BLOCK_SIZE * BLOCK_SIZE
            source = _check(first, reference, reference_router).history
            _check(second, reference, reference_router, history=source)


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["recompute", "cached"])
def test_preemption_and_resume(tiny_model, reference, reference_router, prefix_caching):
    prompts = [random_prompt(length, seed=60 + length) for length in (500, 161, 700, 1100)]
    blocks = sum(-(-len(prompt) // BLOCK_SIZE) for prompt in prompts) + 4
    # Query sums take their part of the memory: 65 bytes in 16 * 512, layer by layer.
    bytes_per_block = 4 * 2 * 2 * 32 * 4 * BLOCK_SIZE
    with Engine(
        tiny_model,
        {},
        block_size=BLOCK_SIZE,
        max_model_len=2048,
        max_num_batched_tokens=300,
        enable_prefix_caching=prefix_caching,
        kv_cache_memory_bytes=int(1.01 * blocks * bytes_per_block),
    ) as engine:
        answers = engine.generate(prompts, 200)
    assert sum(answer.preemptions for answer in answers) > 0
    for answer in answers:
        request = _check(answer, reference, reference_router)
        settled = answer.step_routes[-1]
        done = next(i for i, (s, n, _) in enumerate(answer.steps) if s + n >= len(answer.prompt))
        assert all(routes == settled for routes in answer.step_routes[done:])
        assert request.prompt_done


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.0])
def test_threshold(tiny_model, reference, reference_router, threshold):
    with Engine(tiny_model, {"threshold": threshold}, block_size=BLOCK_SIZE) as engine:
        answers = engine.generate([random_prompt(n, seed=n) for n in (97, 500)], 8)
    for answer in answers:
        _check(answer, reference, reference_router, threshold=threshold)
        if threshold == 0.0:
            assert answer.routes == [1] * 4


@pytest.mark.parametrize("shared_prefix", [0, 320], ids=["apart", "shared-prefix"])
def test_mixed_batch_equals_alone(tiny_model, shared_prefix):
    """Requests with different routes in one batch do not leak into each other."""
    prefix = random_prompt(shared_prefix, seed=5)
    prompts = [prefix + random_prompt(n, seed=70 + n) for n in (200, 350, 31, 700, 180, 64)]
    arguments = {"block_size": BLOCK_SIZE, "enable_prefix_caching": bool(shared_prefix)}
    with Engine(tiny_model, {}, **arguments) as engine:
        if shared_prefix:
            engine.generate([prefix + [1]], 1)
        alone = [engine.generate([prompt], 40)[0] for prompt in prompts]
    with Engine(tiny_model, {}, **arguments) as engine:
        if shared_prefix:
            engine.generate([prefix + [1]], 1)
        together = engine.generate(prompts, 40)
    assert len({tuple(answer.routes) for answer in together}) > 1
    for one, other in zip(alone, together, strict=True):
        assert one.cached_tokens == other.cached_tokens == shared_prefix
        assert one.routes == other.routes
        assert one.tokens == other.tokens
