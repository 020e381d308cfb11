"""`free_kv` with `full_decode_tokens`: what an answer's first tokens read is there, and goes later.

Oracle: the same engine without `free_kv`, preempted at the same step; for memory, the formula of
docs/KV_MEMORY.md.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
from prometheus_client import generate_latest

from flux_vllm.kv.spec import FluxSpec
from flux_vllm.router.checkpoint import read_router, write_router
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.free_kv import PoisonedEngine, given_back, schedule_ahead
from tests.helpers.metrics import parse, total
from tests.helpers.models import random_prompt

pytestmark = pytest.mark.vllm

BLOCK_SIZE, EARLY, TOKENS = 32, 40, 70
PATTERN = {"sink_tokens": SINK_TOKENS, "window_tokens": WINDOW_TOKENS}
SIZES = PATTERN | {"block_size": BLOCK_SIZE}
STATIC = PATTERN | {
    "policy": "static",
    "sparse_layers": [0, 1, 2],
    "full_decode_tokens": EARLY,
}
ROUTES = [0, 0, 0, 1]
PROMPTS = [random_prompt(length, seed=length) for length in (710, 390, 655, 30)]
FREE = {"free_kv": True}


def _same(answers, others):
    """Hold two engines' answers to each other, to the bit."""
    for answer, other in zip(answers, others, strict=True):
        assert (answer.tokens, answer.logprobs) == (other.tokens, other.logprobs)
        assert (answer.routes, answer.steps) == (other.routes, other.steps)
        assert answer.cached_tokens == other.cached_tokens


@pytest.mark.parametrize(
    ("pattern", "chunk", "is_async"),
    [
        ("streaming", 97, False),
        ("streaming", 256, True),
        pytest.param("triangle", 97, False, marks=pytest.mark.long),
        ("triangle", 256, True),
    ],
)
def test_freed_and_overwritten_equals_kept(tiny_model, monkeypatch, pattern, chunk, is_async):
    """Answers that end within their first tokens give nothing back, longer ones what they did."""
    if is_async:
        schedule_ahead(monkeypatch)
    flux = STATIC | {"sparse_pattern": pattern}
    arguments = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": chunk}
    name = f"early-{pattern}-{chunk}"
    with PoisonedEngine(tiny_model, flux | FREE, served_model_name=name, **arguments) as engine:
        short = engine.generate(PROMPTS, EARLY + 1)
        assert not engine.freed
        answers = engine.generate(PROMPTS, TOKENS)
        metrics = parse(generate_latest().decode())
        freed = given_back(answers, routes=ROUTES, **SIZES)
        assert len(engine.freed) == freed > 0
        assert total(metrics, "flux_kv_blocks_freed_total", model_name=name) == freed
        pool = engine.manager.block_pool
        assert pool.get_num_free_blocks() == len(pool.blocks) - 1
    with Engine(tiny_model, flux, **arguments) as engine:
        _same(short, engine.generate(PROMPTS, EARLY + 1))
        _same(answers, engine.generate(PROMPTS, TOKENS))


@pytest.mark.parametrize("pattern", ["streaming", pytest.param("triangle", marks=pytest.mark.long)])
def test_freed_one_token_too_early_changes_answers(tiny_model, monkeypatch, pattern):
    """A check of the checks: the last of the first tokens reads what is overwritten then."""
    whole_until = FluxSpec.whole_until
    flux = STATIC | {"sparse_pattern": pattern}
    answers = []
    for early in (0, 1):
        monkeypatch.setattr(FluxSpec, "whole_until", lambda *a, n=early: whole_until(*a) - n)
        with PoisonedEngine(tiny_model, flux | FREE, block_size=BLOCK_SIZE) as engine:
            answers += engine.generate(PROMPTS[:1], TOKENS)
    right, wrong = (answer.logprobs for answer in answers)
    assert right[:EARLY] == wrong[:EARLY]
    # Of the token that the query at the prompt's length + EARLY - 1 gives.
    assert right[EARLY] != wrong[EARLY]


@pytest.mark.parametrize(
    ("pattern", "chunk", "is_async", "sparse_prefill"),
    [
        ("streaming", 97, False, False),
        pytest.param("triangle", 97, False, False, marks=pytest.mark.long),
        ("triangle", 256, True, True),
    ],
)
def test_routed_clusters(
    tiny_model, tmp_path, monkeypatch, pattern, chunk, is_async, sparse_prefill
):
    """The router's file says how many; each request gives back what its routes allow."""
    if is_async:
        schedule_ahead(monkeypatch)
    router, info = read_router(tiny_model)
    info = replace(info, freeing_order=(2, 0, 3, 1), full_decode_tokens=EARLY)
    write_router(tmp_path, router, info)
    flux = {
        "router": str(tmp_path),
        "sparse_pattern": pattern,
        "sparse_prefill": sparse_prefill,
    }
    arguments = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": chunk}
    with PoisonedEngine(tiny_model, flux | FREE, **arguments) as engine:
        short = engine.generate(PROMPTS, EARLY + 1)
        assert not engine.freed
        answers = engine.generate(PROMPTS, TOKENS)
        assert len(engine.freed) == given_back(answers, **SIZES) > 0
    assert len({tuple(answer.routes) for answer in answers if answer.routes}) > 1
    with Engine(tiny_model, flux, **arguments) as engine:
        _same(short, engine.generate(PROMPTS, EARLY + 1))
        _same(answers, engine.generate(PROMPTS, TOKENS))


@pytest.mark.parametrize("pattern", ["streaming", pytest.param("triangle", marks=pytest.mark.long)])
def test_follow_ups(tiny_model, pattern):
    """A hit is whole, as without `free_kv`; what others took of it is computed again."""
    flux = STATIC | {"sparse_pattern": pattern}
    arguments = {
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": True,
    }
    prompt = PROMPTS[0]
    with PoisonedEngine(tiny_model, flux | FREE, **arguments) as engine:
        (first,) = engine.generate([prompt], TOKENS)
        gave_back = len(engine.freed)
        longer = prompt + first.tokens + random_prompt(20, seed=1)
        questions = [longer, prompt, prompt[:400] + random_prompt(30, seed=2)]
        hits = [engine.generate([question], TOKENS)[0] for question in questions]
        assert len(engine.freed) > gave_back > 0
        engine.evict_freed()
        (again,) = engine.generate([longer], TOKENS)
    assert [answer.cached_tokens for answer in hits] == [768, 704, 384]
    assert again.cached_tokens <= BLOCK_SIZE
    with Engine(tiny_model, flux, **arguments) as engine:
        _same([first], engine.generate([prompt], TOKENS))
        _same(hits, [engine.generate([question], TOKENS)[0] for question in questions])
        engine.forget_prefixes()
        (computed,) = engine.generate([longer], TOKENS)
    assert again.tokens == computed.tokens
    assert again.logprobs == pytest.approx(computed.logprobs, abs=1e-4)


def _preempt_at(engine, step):
    """Preempt all running requests before a step, and forget what they had computed."""
    scheduler, steps = engine.core.scheduler, iter(range(10**6))
    schedule = scheduler.schedule

    def preempting(*args, **kwargs):
        if next(steps) == step:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args, **kwargs)

    scheduler.schedule = preempting


def _answered(answer):
    """Count the tokens that an answer had when it was preempted, once."""
    (answered,) = (
        before + length - len(answer.prompt)
        for (before, length, _), (start, _, _) in pairwise(answer.steps)
        if start < before
    )
    return answered


def test_routed_requests_preempted_after_giving_back(tiny_model, tmp_path):
    """Without `full_decode_tokens`; resumed under the routes that they had."""
    write_router(tmp_path, *read_router(tiny_model))
    flux = {"router": str(tmp_path)}
    arguments = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 97}
    prompts, tokens, step = [random_prompt(n, seed=n) for n in (710, 640, 655)], 40, 40
    with PoisonedEngine(tiny_model, flux | FREE, **arguments) as engine:
        _preempt_at(engine, step)
        answers = engine.generate(prompts, tokens)
        assert engine.freed
    for answer in answers:
        assert answer.resumed_at == [0]
        assert _answered(answer) > 0
    assert len({tuple(answer.routes) for answer in answers}) > 1
    with Engine(tiny_model, flux, **arguments) as engine:
        _preempt_at(engine, step)
        _same(answers, engine.generate(prompts, tokens))


@pytest.mark.parametrize(
    ("pattern", "gave_back"),
    [
        ("streaming", True),
        pytest.param("streaming", False, marks=pytest.mark.long),
        pytest.param("triangle", True, marks=pytest.mark.long),
        ("triangle", False),
    ],
)
def test_preempted_answers(tiny_model, pattern, gave_back):
    """Preempted before or after it gave back, a request holds all again until its first tokens.

    A later chunk of what is computed anew begins behind these: under `triangle` it reads all keys.
    """
    flux = STATIC | {"sparse_pattern": pattern}
    arguments = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 97}
    prompts, tokens, step = PROMPTS[:2], 110, 100 if gave_back else 20
    with PoisonedEngine(tiny_model, flux | FREE, **arguments) as engine:
        _preempt_at(engine, step)
        answers = engine.generate(prompts, tokens)
        once = given_back(answers, routes=ROUTES, **SIZES)
        assert len(engine.freed) > once if gave_back else len(engine.freed) == once
    for answer in answers:
        assert answer.resumed_at == [0]
        assert (_answered(answer) > EARLY) == gave_back
    with Engine(tiny_model, flux, **arguments) as engine:
        _preempt_at(engine, step)
        _same(answers, engine.generate(prompts, tokens))
