"""`free_kv` on real engines: groups, freeing and overwriting what is free change no bit.

Oracle: the same engine without `free_kv`; for memory, the formula of docs/KV_MEMORY.md.
"""

from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from transformers import Gemma4TextConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.kv.groups import cluster_layers
from flux_vllm.router.checkpoint import read_router, write_router
from flux_vllm.router.route import Route
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.free_kv import PoisonedEngine, given_back, schedule_ahead
from tests.helpers.metrics import parse, total
from tests.helpers.models import (
    random_prompt,
    write_random_router,
    write_tiny_llama,
    write_tiny_model,
)
from tests.helpers.tensor_parallel import RankedEngine

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
PATTERN = {"sink_tokens": SINK_TOKENS, "window_tokens": WINDOW_TOKENS}
SIZES = PATTERN | {"block_size": BLOCK_SIZE}
FLUX = PATTERN | {"policy": "static", "sparse_layers": [0, 1, 2]}
FREE = FLUX | {"free_kv": True}
LENGTHS = [710, 159, 30]
PROMPTS = [random_prompt(length, seed=length) for length in LENGTHS]
TOKENS = 70


def _answers(engine, prompts=PROMPTS):
    return [(a.tokens, a.logprobs) for a in engine.generate(prompts, TOKENS)]


def _plain(model, flux=None, **arguments):
    with Engine(model, FLUX | (flux or {}), block_size=BLOCK_SIZE, **arguments) as engine:
        return _answers(engine)


@pytest.mark.parametrize(
    ("pattern", "chunk", "is_async"),
    [
        pytest.param("streaming", 97, False, marks=pytest.mark.long),
        ("streaming", 256, True),
        pytest.param("triangle", 256, True, marks=pytest.mark.long),
        ("xattention", 256, False),
    ],
)
def test_freed_and_overwritten_equals_kept(tiny_model, monkeypatch, pattern, chunk, is_async):
    arguments = {"max_num_batched_tokens": chunk}
    if is_async:
        schedule_ahead(monkeypatch)
    pattern = {"sparse_pattern": pattern}
    expected = _plain(tiny_model, flux=pattern, **arguments)
    with PoisonedEngine(tiny_model, FREE | pattern, block_size=BLOCK_SIZE, **arguments) as engine:
        assert len(engine.managers) == 4
        assert isinstance(engine.core.scheduler, AsyncScheduler) == is_async
        assert engine.core.batch_queue_size == 1 + is_async
        assert _answers(engine) == expected
        # Blocks behind the sinks whose tokens all lie more than 128 before the last window; a step
        # in flight makes no difference to these lengths.
        ends = [(n + TOKENS - 128 - WINDOW_TOKENS) // BLOCK_SIZE for n in LENGTHS]
        assert len(engine.freed) == 3 * sum(max(end - 1, 0) for end in ends)


def test_layers_of_the_wrong_cluster_change_answers(tiny_model, monkeypatch):
    """A check of the checks: freeing a FULL layer's keys shows."""
    from flux_vllm.kv import worker

    wrong = cluster_layers(range(4), (0, 1, 3))
    monkeypatch.setattr(worker, "choose_clusters", lambda *_: wrong)
    with PoisonedEngine(tiny_model, FREE, block_size=BLOCK_SIZE) as engine:
        assert _answers(engine)[0] != _plain(tiny_model)[0]


def test_an_owners_blocks_are_its_sharers_too(tmp_path):
    """Layers 2 and 3 attend to the keys of layer 1: freed once, by its route, for all three."""
    model = write_tiny_model(
        tmp_path,
        Gemma4TextConfig,
        layer_types=["full_attention"] * 4,
        num_kv_shared_layers=2,
        global_head_dim=32,
        hidden_size_per_layer_input=0,
    )
    sharing = {"sparse_layers": [1, 2, 3]}
    expected = _plain(model, sharing)
    assert expected != _plain(model, {"sparse_layers": []})
    with PoisonedEngine(model, FREE | sharing, block_size=BLOCK_SIZE) as engine:
        assert len(engine.managers) == 2
        assert _answers(engine) == expected
        ends = [(n + TOKENS - 128 - WINDOW_TOKENS) // BLOCK_SIZE for n in LENGTHS]
        assert len(engine.freed) == sum(max(end - 1, 0) for end in ends)


@pytest.mark.parametrize("pattern", ["streaming", pytest.param("triangle", marks=pytest.mark.long)])
def test_follow_ups_of_freed_prompts(tiny_model, pattern):
    """Hits need what a follow-up reads; what was evicted and overwritten is computed again."""
    prompt = PROMPTS[0]
    arguments = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 256}
    flux = {"sparse_pattern": pattern}
    with PoisonedEngine(tiny_model, FREE | flux, enable_prefix_caching=True, **arguments) as engine:
        (first,) = engine.generate([prompt], TOKENS)
        longer = prompt + first.tokens + random_prompt(20, seed=1)
        followed = []
        for question in (longer, prompt, prompt[:400] + random_prompt(30, seed=2)):
            engine.evict_freed()
            followed += engine.generate([question], 12)
    hits = [answer.cached_tokens for answer in followed]
    is_local = pattern == "streaming"
    if is_local:
        # Whole blocks of all that was computed, by sinks and window; before 400 the window is gone.
        assert hits[:2] == [768, 704]
        assert hits[2] <= BLOCK_SIZE
    else:
        assert max(hits) <= BLOCK_SIZE, "blocks between sinks and window were evicted"
    # Generated text that is hit was attended by whole blocks, prompts exactly: the same hits.
    with Engine(tiny_model, FLUX | flux, enable_prefix_caching=is_local, **arguments) as engine:
        engine.generate([prompt], TOKENS)
        for answer in followed:
            (expected,) = engine.generate([answer.prompt], 12)
            assert answer.tokens == expected.tokens
            assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_more_requests_fit(tiny_model):
    """Requests run together that would not fit; some are preempted, all are right."""
    prompts = [random_prompt(640, seed=length) for length in range(5)]
    arguments = {
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": 256,
        "max_model_len": 1024,
        "served_model_name": "fits",
    }
    blocks = 46  # of the plain engine, of four layers; a group of the other's has one
    with PoisonedEngine(tiny_model, FLUX, num_gpu_blocks_override=blocks, **arguments) as engine:
        expected = engine.generate(prompts, 60)
        assert engine.most_running == 2, "22 blocks each"
    with PoisonedEngine(
        tiny_model, FREE, num_gpu_blocks_override=4 * blocks, **arguments
    ) as engine:
        answers = engine.generate(prompts, 60)
        freed = len(engine.freed)
        # 22 blocks in the FULL group; sinks, window and 128 tokens before it in the three others.
        held = 22 + 3 * (1 + (WINDOW_TOKENS + 128) // BLOCK_SIZE + 2)
        assert engine.most_running >= 4 * blocks // held == 3
        assert engine.manager.block_pool.get_num_free_blocks() == 4 * blocks - 1
        metrics = parse(generate_latest().decode())
    for answer, other in zip(answers, expected, strict=True):
        assert answer.tokens == other.tokens
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    preempted = sum(answer.preemptions for answer in answers)
    assert total(metrics, "flux_kv_blocks_freed_total", model_name="fits") == freed > 0
    assert total(metrics, "flux_request_kv_bytes_count", model_name="fits") == 5 + preempted
    assert total(metrics, "flux_kv_admitted_requests_total", model_name="fits") > 0


def _speculate(model, flux):
    """Answer with drafts."""
    ngram = {"num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    with PoisonedEngine(
        model,
        flux,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=256,
        speculative_config={"method": "ngram"} | ngram,
    ) as engine:
        answers = engine.generate([PROMPTS[0], PROMPTS[1]], TOKENS, allowed_token_ids=[3, 77, 400])
        drafted = sum(
            length > 1 for a in answers for _, length, phase in a.steps if phase == "decode"
        )
        return [(a.tokens, a.logprobs) for a in answers], drafted, len(engine.freed)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("early", [0, 20])
def test_ngram_speculation(tiny_model, early):
    """Rows of several queries, drafts refused: what is freed counts verified tokens alone."""
    (freeing, drafted, freed), (plain, _, none) = (
        _speculate(tiny_model, flux | {"full_decode_tokens": early}) for flux in (FREE, FLUX)
    )
    assert freeing == plain
    assert drafted
    assert freed > none == 0


@pytest.mark.long
def test_all_layers_sparse_is_one_group(tiny_model):
    flux = {key: value for key, value in FLUX.items() if key != "sparse_layers"}
    flux["policy"] = "sparse"
    with PoisonedEngine(tiny_model, flux | {"free_kv": True}, block_size=BLOCK_SIZE) as engine:
        assert len(engine.managers) == 1
        answers = _answers(engine)
        assert engine.freed
        with pytest.raises(UnsupportedConfigurationError, match="flux_fix_routes: expected"):
            engine.worker.flux_fix_routes([0])
    with Engine(tiny_model, flux, block_size=BLOCK_SIZE) as engine:
        assert answers == _answers(engine)


def _routed(tmp_path, model, **info):
    """Write a router that gives these prompts routes of their own. Returns: its configuration."""
    router, found = read_router(model)
    write_router(tmp_path, router, replace(found, **info))
    return {"router": str(tmp_path)}


ROUTED_LENGTHS = [710, 640, 655, 159, 30]
ROUTED_PROMPTS = [random_prompt(length, seed=length) for length in ROUTED_LENGTHS]


@pytest.mark.parametrize(
    ("pattern", "chunk", "is_async", "always_sparse", "sparse_prefill"),
    [
        ("streaming", 97, False, (), False),
        pytest.param("streaming", 256, True, (0, 3), False, marks=pytest.mark.long),
        pytest.param("triangle", 256, True, (), False, marks=pytest.mark.long),
        ("triangle", 256, True, (), True),
    ],
)
def test_routed_clusters(
    tiny_model, tmp_path, monkeypatch, pattern, chunk, is_async, always_sparse, sparse_prefill
):
    """Each request gives back what its own routes allow: no bit changes, as many as they say."""
    if is_async:
        schedule_ahead(monkeypatch)
    flux = _routed(tmp_path, tiny_model, freeing_order=(2, 0, 3, 1), always_sparse=always_sparse)
    flux |= {"sparse_pattern": pattern, "sparse_prefill": sparse_prefill}
    arguments = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": chunk}
    with PoisonedEngine(tiny_model, flux | {"free_kv": True}, **arguments) as engine:
        assert len(engine.managers) == 4
        answers = engine.generate(ROUTED_PROMPTS, TOKENS)
        assert len(engine.freed) == given_back(answers, **SIZES)
        assert engine.manager.block_pool.get_num_free_blocks() == (
            len(engine.manager.block_pool.blocks) - 1
        )
    assert len({tuple(answer.routes) for answer in answers if answer.routes}) > 1
    with Engine(tiny_model, flux, **arguments) as engine:
        for answer, expected in zip(answers, engine.generate(ROUTED_PROMPTS, TOKENS), strict=True):
            assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)
            assert answer.routes == expected.routes


def test_clusters_of_several_layers(tmp_path):
    """Six clusters of two layers: each request gives back those whose layers are both SPARSE."""
    layers, sizes = 12, {"sink_tokens": SINK_TOKENS, "window_tokens": WINDOW_TOKENS}
    model = write_tiny_llama(tmp_path / "model", layers=layers)
    router = write_random_router(
        tmp_path, num_layers=layers, head_dim=32, model_folder=model, **sizes
    )
    flux, arguments = {"router": str(router)}, {"block_size": BLOCK_SIZE}
    with PoisonedEngine(model, flux | {"free_kv": True}, **arguments) as engine:
        groups = engine.core.scheduler.kv_cache_config.kv_cache_groups
        clusters = [[int(name.split(".")[2]) for name in group.layer_names] for group in groups]
        assert [len(cluster) for cluster in clusters] == [2] * 6
        answers = engine.generate(ROUTED_PROMPTS, TOKENS)
        expected = 0
        for answer in answers:
            if answer.routes:
                routes = [max(answer.routes[i] for i in cluster) for cluster in clusters]
                expected += given_back([answer], **SIZES, routes=routes)
        assert len(engine.freed) == expected
    mixed = [
        {answer.routes[i] for i in cluster}
        for answer in answers
        for cluster in clusters
        if answer.routes
    ]
    assert {0, 1} in mixed
    assert {0} in mixed
    with Engine(model, flux, **arguments) as engine:
        for answer, plain in zip(answers, engine.generate(ROUTED_PROMPTS, TOKENS), strict=True):
            assert (answer.tokens, answer.logprobs) == (plain.tokens, plain.logprobs)


def test_routes_by_the_wrong_layers_change_answers(tiny_model, tmp_path, monkeypatch):
    """A check of the checks: a scheduler that takes one layer for another frees FULL keys."""
    from flux_vllm.kv import scheduler

    flux = _routed(tmp_path, tiny_model) | {"free_kv": True}
    arguments = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 97}
    with PoisonedEngine(tiny_model, flux, **arguments) as engine:
        expected = engine.generate(ROUTED_PROMPTS, TOKENS)
    layers = {tuple(a.routes) for a in expected if a.routes}
    assert any(len(set(routes)) > 1 for routes in layers)
    right = scheduler.extract_layer_index
    monkeypatch.setattr(scheduler, "extract_layer_index", lambda name: 3 - right(name))
    with PoisonedEngine(tiny_model, flux, **arguments) as engine:
        answers = engine.generate(ROUTED_PROMPTS, TOKENS)
    assert any(a.logprobs != b.logprobs for a, b in zip(answers, expected, strict=True))


def test_routed_follow_ups(tiny_model, tmp_path):
    """A prefix serves a request of unknown routes where every block of it is there, else not."""
    flux = _routed(tmp_path, tiny_model)
    arguments = {
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": True,
    }
    followed, hits = [], []
    with PoisonedEngine(tiny_model, flux | {"free_kv": True}, **arguments) as engine:
        firsts = engine.generate(ROUTED_PROMPTS[:3], TOKENS)
        longer = [a.prompt + a.tokens + random_prompt(20, seed=1) for a in firsts]
        for evicts in (False, True):
            if evicts:
                engine.evict_freed()
            answers = engine.generate(longer, 12)
            followed.append(answers)
            hits.append([answer.cached_tokens for answer in answers])
        assert engine.freed
    assert min(hits[0]) >= 640
    for answer, first, hit in zip(followed[1], firsts, hits[1], strict=True):
        gave_back = any(route == Route.SPARSE for route in first.routes)
        assert (hit <= BLOCK_SIZE) == gave_back, (answer.routes, first.routes, hits)
    with Engine(tiny_model, flux, **arguments | {"enable_prefix_caching": False}) as engine:
        for answer, expected in zip(followed[1], engine.generate(longer, 12), strict=True):
            if answer.cached_tokens <= BLOCK_SIZE:
                assert answer.tokens == expected.tokens
                assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_routed_preemption(tiny_model, tmp_path):
    """Few blocks: requests are preempted in their prompts, and resumed under their routes."""
    prompts = [random_prompt(300 + 40 * index, seed=index) for index in range(6)]
    flux = _routed(tmp_path, tiny_model)
    arguments = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 256, "max_model_len": 1024}
    with Engine(tiny_model, flux, **arguments) as engine:
        expected = engine.generate(prompts, 100)
    blocks = 4 * 32 + 1  # least: a FULL request of the longest length
    with PoisonedEngine(
        tiny_model, flux | {"free_kv": True}, num_gpu_blocks_override=blocks, **arguments
    ) as engine:
        answers = engine.generate(prompts, 100)
        assert engine.manager.block_pool.get_num_free_blocks() == blocks - 1
        assert engine.most_running > 1
    assert sum(answer.preemptions for answer in answers) > 0
    for answer, other in zip(answers, expected, strict=True):
        assert answer.tokens == other.tokens
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert answer.routes == other.routes


@pytest.mark.long
def test_routed_clusters_on_two_ranks(tiny_model, tmp_path):
    """One rank's output brings the routes of all, from another process."""
    flux = _routed(tmp_path, tiny_model)
    arguments = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 256}
    served = []
    for free_kv in (True, False):
        name = f"ranks-{free_kv}"
        with RankedEngine(
            tiny_model, flux | {"free_kv": free_kv}, 2, served_model_name=name, **arguments
        ) as engine:
            served.append(engine.generate(ROUTED_PROMPTS, TOKENS))
            metrics = parse(generate_latest().decode())
        freed = total(metrics, "flux_kv_blocks_freed_total", model_name=name) if free_kv else 0
        assert freed == (given_back(served[0], **SIZES) if free_kv else 0)
    for answer, expected in zip(*served, strict=True):
        assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)
        assert answer.routes == expected.routes
