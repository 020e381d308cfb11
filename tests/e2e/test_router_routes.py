"""Policy `router` on a real engine: one probe a prompt, the same bits however it is served.

Oracles: tests/helpers/reference.py, which runs transformers over a prompt's two ends, decides by a
router written anew, and replays the engine's cache history under those routes; for routes and
P(FULL) across schedules, equality to the bit. The random router's routes vary from prompt to
prompt. One engine serves nearly all: its chunks and KV blocks are limited, and its prefix cache is
emptied, between tests. Tests with an engine of their own come last: its end is the end of the
process groups that the shared one uses.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Answer, Engine
from tests.helpers.models import random_prompt, write_random_router, write_tiny_llama
from tests.helpers.reference import ReferenceRouter, SparsePattern
from tests.helpers.replay import assert_routed

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
REACH = SINK_TOKENS + WINDOW_TOKENS
PATTERN = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
CHUNKS = [0, 256, 97]


@pytest.fixture(scope="module")
def shared(tiny_model) -> Iterator[Engine]:
    with Engine(
        tiny_model, {}, block_size=BLOCK_SIZE, enable_prefix_caching=True, max_num_seqs=8
    ) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Engine:
    shared.reset()
    return shared


def _check(answer, reference, router, history=None):
    return assert_routed(answer, reference, router, PATTERN, history)


def _bits(answer: Answer) -> tuple:
    assert answer.routes is not None
    return tuple(answer.routes), tuple(answer.p_full)


def test_same_bits_for_every_schedule(engine: Engine) -> None:
    """Chunks of 97 and 256 and none, alone and with neighbours, first asked and cached."""
    prompts = [random_prompt(length, seed=length) for length in (161, 333, 640, 1281, 1288, 2100)]
    seen: list[set] = [set() for _ in prompts]
    for chunk in CHUNKS:
        engine.limit_chunks(chunk)
        engine.forget_prefixes()
        for bits, prompt in zip(seen, prompts, strict=True):
            first, again = (engine.generate([prompt], 2)[0] for _ in range(2))
            assert first.cached_tokens == 0
            assert again.cached_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
            bits |= {_bits(first), _bits(again)}
        engine.forget_prefixes()
        for bits, answer in zip(seen, engine.generate(prompts, 2), strict=True):
            bits.add(_bits(answer))
    assert [len(bits) for bits in seen] == [1] * len(prompts)
    assert len({routes for ((routes, _),) in seen}) > 2, "the router decides alike for all prompts"


@pytest.mark.parametrize("chunk", CHUNKS)
def test_routes_and_outputs(engine: Engine, reference, reference_router, chunk: int) -> None:
    """Prompts up to the reach have routes only once their text outgrows it."""
    engine.limit_chunks(chunk)
    routes = set()
    for length in (1, 97, REACH - 10, REACH, REACH + 1, 257, 333, 640, 1000):
        (answer,) = engine.generate([random_prompt(length, seed=length)], 24, prompt_logprobs=True)
        _check(answer, reference, reference_router)
        assert (answer.routes is None) == (length + 23 <= REACH)
        routes |= {tuple(answer.routes or ())}
    assert len(routes) > 4


def test_short_prompt_is_probed_once_its_text_is_long(engine: Engine, reference_router) -> None:
    prompt = random_prompt(40, seed=4)
    asked = []
    decide = engine.runtime.probe.decide
    engine.runtime.probe.decide = lambda p: (asked.append(p.length), decide(p))
    try:
        engine.generate([prompt], REACH - 39)  # the last token is sampled and never computed
        assert asked == []
        (answer,) = engine.generate([prompt], REACH - 38)
    finally:
        del engine.runtime.probe.decide
    assert asked == [40]
    assert answer.routes is not None


def test_pooled_queries_are_those_of_transformers(engine, reference, reference_router) -> None:
    for length in (5, 130, 255, 256, 257, 1500):
        prompt = random_prompt(length, seed=length)
        expected = reference_router.pooled(reference, prompt)
        torch.testing.assert_close(engine.probe(prompt)[0], expected, rtol=0, atol=1e-4)


def test_a_probe_writes_no_key_and_no_value(engine: Engine) -> None:
    engine.generate([random_prompt(500, seed=1)], 2)
    context = engine.worker.vllm_config.compilation_config.static_forward_context
    caches = [layer.kv_cache for layer in context.values()]
    before = [cache.clone() for cache in caches]
    assert all(cache.any() for cache in caches)
    engine.probe(random_prompt(700, seed=2))
    for cache, copy in zip(caches, before, strict=True):
        assert torch.equal(cache.view(torch.uint8), copy.view(torch.uint8))


@pytest.mark.parametrize("chunk", [0, 97])
def test_prefix_hit(engine: Engine, reference, reference_router, chunk: int) -> None:
    """The keys that are found were computed under the first prompt's routes."""
    engine.limit_chunks(chunk)
    for length, tail in ((96, 33), (333, 20), (500, 300), (1000, 64)):
        prompt = random_prompt(length, seed=length + 1)
        longer = prompt + random_prompt(tail, seed=tail)
        first, second = (engine.generate([p], 24)[0] for p in (prompt, longer))
        assert second.cached_tokens == length // BLOCK_SIZE * BLOCK_SIZE
        source = _check(first, reference, reference_router).history
        _check(second, reference, reference_router, history=source)


def test_second_turn(engine: Engine, reference, reference_router) -> None:
    for length, generated in ((40, 200), (600, 100)):
        prompt = random_prompt(length, seed=length + 2)
        (first,) = engine.generate([prompt], generated)
        turn = prompt + first.tokens + random_prompt(50, seed=generated)
        (second,) = engine.generate([turn], 24)
        # The last generated token is sampled and never computed.
        computed = length + generated - 1
        assert second.cached_tokens == computed // BLOCK_SIZE * BLOCK_SIZE
        source = _check(first, reference, reference_router).history
        _check(second, reference, reference_router, history=source)


@pytest.mark.parametrize("shared_prefix", [0, 320], ids=["apart", "shared-prefix"])
def test_mixed_batch(engine: Engine, reference, reference_router, shared_prefix: int) -> None:
    """Requests with different routes in one batch do not leak into each other."""
    prefix = random_prompt(shared_prefix, seed=5)
    prompts = [prefix + random_prompt(n, seed=70 + n) for n in (200, 350, 31, 700, 180, 64)]
    source = None
    if shared_prefix:
        (answer,) = engine.generate([prefix + [1]], 1)
        source = _check(answer, reference, reference_router).history
    together = engine.generate(prompts, 40)
    assert len({tuple(answer.routes or ()) for answer in together}) > 2
    for answer in together:
        assert answer.cached_tokens == shared_prefix
        _check(answer, reference, reference_router, history=source)


def test_aborted_request_and_its_id_again(engine: Engine) -> None:
    """Before and after its probe."""
    from vllm import SamplingParams

    core, runtime = engine.llm.llm_engine, engine.runtime
    (expected,) = engine.generate([random_prompt(400, seed=3)], 1)
    runtime.finish(list(runtime.table._slots))
    for length in (40, 400):
        prompt = {"prompt_token_ids": random_prompt(length, seed=3)}
        core.add_request("again", prompt, SamplingParams())
        core.step()
        assert runtime.status()["live_requests"] == 1
        core.abort_request(["again"])
        while core.has_unfinished_requests():
            core.step()
    (answer,) = engine.generate([random_prompt(400, seed=3)], 1)  # tells of those that ended
    assert _bits(answer) == _bits(expected)
    assert runtime.status()["live_requests"] == 1
    assert not runtime.prompts_may_be_due()


@pytest.mark.parametrize("skips_cache", [True, False], ids=["recompute", "cached"])
def test_preemption_and_resume(engine: Engine, reference, reference_router, skips_cache) -> None:
    prompts = [random_prompt(length, seed=60 + length) for length in (500, 161, 700, 1100, 100)]
    blocks = sum(-(-len(prompt) // BLOCK_SIZE) for prompt in prompts) + 3
    engine.limit_steps(300)
    with engine.few_blocks(blocks):
        answers = engine.generate(prompts, 70, skip_reading_prefix_cache=skips_cache)
    engine.forget_prefixes()
    # The short one needs no route before its text outgrows sinks and window.
    alone = [engine.generate([prompt], 70)[0] for prompt in prompts]
    assert sum(answer.preemptions for answer in answers) > 0
    assert (max(at for answer in answers for at in answer.resumed_at) == 0) == skips_cache
    for answer, undisturbed in zip(answers, alone, strict=True):
        _check(answer, reference, reference_router)
        assert _bits(answer) == _bits(undisturbed)


def test_router_that_looks_at_more(tiny_model, reference, tmp_path) -> None:
    """Several pools, a smaller probe, and another layer's queries; widths of its own."""
    path = write_random_router(
        tmp_path,
        num_layers=4,
        head_dim=32,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=tiny_model,
        pools=("tail:8", "overlap:70", "head:16", "length", "ends:24"),
        probe=(40, 30),
        context_layers=(2,),
        widths=(48, 16, 32, 24),
    )
    router = ReferenceRouter.load(path)
    with Engine(tiny_model, {"router": str(path)}, block_size=BLOCK_SIZE) as engine:
        answers = engine.generate([random_prompt(n, seed=n) for n in (161, 250, 400, 900)], 8)
        for answer in answers:
            expected = router.pooled(reference, answer.prompt)
            found = engine.probe(answer.prompt)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for answer in answers:
        _check(answer, reference, router)
    assert len({tuple(answer.routes) for answer in answers}) > 1


def test_positions_past_the_rope_table_do_not_end_the_engine(tmp_path, monkeypatch) -> None:
    """Where the operator allows them, vLLM answers with whatever it reads there; so do routes."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    model = write_tiny_llama(tmp_path, layers=2, max_position_embeddings=512)
    write_random_router(tmp_path, num_layers=2, head_dim=32)
    with Engine(model, {}, max_model_len=1024, block_size=BLOCK_SIZE) as engine:
        answers = []
        for length in (300, 900, 300):
            engine.forget_prefixes()
            answers += engine.generate([random_prompt(length, seed=length)], 4)
            assert len(answers[-1].tokens) == 4
            assert answers[-1].routes is not None
        before, _, after = answers
        # Its tokens may be spoilt: a NaN stays in the memory of vLLM's CPU kernels, stock's too.
        assert (before.routes, before.p_full) == (after.routes, after.p_full)


@pytest.mark.long
def test_same_bits_for_chunks_of_servers(tmp_path: Path) -> None:
    """Chunks of 512, 2,048 and 8,192 tokens and none; a prompt fits each, another does not."""
    model = write_tiny_llama(tmp_path, layers=2, max_position_embeddings=10_240)
    write_random_router(tmp_path, num_layers=2, head_dim=32, model_folder=model)
    prompts = [random_prompt(length, seed=length) for length in (400, 600, 2049, 2100, 8193, 9000)]
    limits = {"max_model_len": 10_240, "max_num_batched_tokens": 10_240}
    bits = []
    with Engine(model, {}, block_size=BLOCK_SIZE, **limits) as engine:
        for chunk in (0, 512, 2048, 8192):
            engine.limit_chunks(chunk)
            bits.append([_bits(engine.generate([prompt], 2)[0]) for prompt in prompts])
            bits.append([_bits(answer) for answer in engine.generate(prompts, 2)])
    assert all(found == bits[0] for found in bits)
    assert len({routes for routes, _ in bits[0]}) > 1, "the router decides alike for all prompts"
