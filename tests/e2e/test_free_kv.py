"""`free_kv` on real engines: groups, freeing and overwriting what is free change no bit.

Oracle: the same engine without `free_kv`; for memory, the formula of docs/KV_MEMORY.md.
"""

import pytest
from prometheus_client import generate_latest

from flux_vllm.errors import UnsupportedConfigurationError
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.free_kv import PoisonedEngine
from tests.helpers.metrics import parse, total
from tests.helpers.models import random_prompt

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
FLUX = {
    "policy": "static",
    "sparse_layers": [0, 1, 2],
    "sink_tokens": SINK_TOKENS,
    "window_tokens": WINDOW_TOKENS,
}
FREE = FLUX | {"free_kv": True}
LENGTHS = [700, 159, 30]
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
        ("streaming", 97, False),
        ("streaming", 256, True),
        ("triangle", 256, True),
        ("xattention", 256, False),
    ],
)
def test_freed_and_overwritten_equals_kept(tiny_model, pattern, chunk, is_async):
    arguments = {"max_num_batched_tokens": chunk, "async_scheduling": is_async}
    pattern = {"sparse_pattern": pattern}
    expected = _plain(tiny_model, flux=pattern, **arguments)
    with PoisonedEngine(tiny_model, FREE | pattern, block_size=BLOCK_SIZE, **arguments) as engine:
        assert len(engine.managers) == 4
        assert _answers(engine) == expected
        # Blocks behind the sinks whose tokens all lie more than 128 before the last window.
        ends = [(n + TOKENS - 128 - WINDOW_TOKENS) // BLOCK_SIZE for n in LENGTHS]
        assert len(engine.freed) == 3 * sum(max(end - 1, 0) for end in ends)


def test_layers_of_the_wrong_cluster_change_answers(tiny_model, monkeypatch):
    """A check of the checks: freeing a FULL layer's keys shows."""
    from flux_vllm import startup

    monkeypatch.setattr(startup, "always_sparse_layers", lambda *_: (0, 1, 3))
    with PoisonedEngine(tiny_model, FREE, block_size=BLOCK_SIZE) as engine:
        assert _answers(engine)[0] != _plain(tiny_model)[0]


@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
def test_follow_ups_of_freed_prompts(tiny_model, pattern):
    """Hits need what a follow-up reads; what was evicted and overwritten is computed again."""
    prompt = PROMPTS[0]
    arguments = {
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": True,
    }
    pattern = {"sparse_pattern": pattern}
    with PoisonedEngine(tiny_model, FREE | pattern, **arguments) as engine:
        (first,) = engine.generate([prompt], TOKENS)
        longer = prompt + first.tokens + random_prompt(20, seed=1)
        followed = []
        for question in (longer, prompt, prompt[:400] + random_prompt(30, seed=2)):
            engine.evict_freed()
            followed += engine.generate([question], 12)
    hits = [answer.cached_tokens for answer in followed]
    if pattern["sparse_pattern"] == "streaming":
        # All that was computed but the last token's block, by sinks and window; of the shorter
        # beginning the window is gone.
        assert hits[0] == 736 and hits[1] in (672, 704 - BLOCK_SIZE) and hits[2] <= BLOCK_SIZE
    else:
        assert hits[0] <= BLOCK_SIZE, "a block between sinks and window was evicted"
    with Engine(tiny_model, FLUX | pattern, **arguments) as engine:
        for answer in followed:
            (expected,) = engine.generate([answer.prompt], 12)
            assert answer.tokens == expected.tokens
            assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_more_requests_fit(tiny_model):
    """Small memory: requests run together that would not fit, some are preempted, all are right."""
    prompts = [random_prompt(640, seed=length) for length in range(5)]
    arguments = {
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": 256,
        "served_model_name": "fits",
    }
    # A block of the plain engine is four layers, one of the other's groups one: a quarter each.
    blocks = 46
    with Engine(tiny_model, FLUX, num_gpu_blocks_override=blocks, **arguments) as engine:
        expected = engine.generate(prompts, 60)
        steps = sum(len(answer.steps) for answer in expected)
    with PoisonedEngine(
        tiny_model, FREE, num_gpu_blocks_override=4 * blocks, **arguments
    ) as engine:
        answers = engine.generate(prompts, 60)
        freed = len(engine.freed)
        # 22 blocks a FULL group; a SPARSE one holds sinks, window and 128 tokens before it.
        held = 22 + 3 * (1 + -(-(WINDOW_TOKENS + 128 + 256) // BLOCK_SIZE) + 1)
        assert engine.most_running >= min(4 * blocks // held, 5) > 2
        assert engine.manager.block_pool.get_num_free_blocks() == 4 * blocks - 1
        metrics = parse(generate_latest().decode())
    for answer, other in zip(answers, expected, strict=True):
        assert answer.tokens == other.tokens
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    preempted = sum(answer.preemptions for answer in answers)
    assert steps, "the plain engine ran"
    assert total(metrics, "flux_kv_blocks_freed_total", model_name="fits") == freed > 0
    assert total(metrics, "flux_request_kv_bytes_count", model_name="fits") == 5 + preempted


def test_ngram_speculation(tiny_model):
    """Rows of several queries, drafts refused: what is freed counts verified tokens alone."""
    prompt = random_prompt(90, seed=3) * 7
    arguments = {
        "block_size": BLOCK_SIZE,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 1,
        },
    }
    with PoisonedEngine(tiny_model, FREE, **arguments) as engine:
        answers = _answers(engine, [prompt, PROMPTS[0]])
        assert engine.freed
    with Engine(tiny_model, FLUX, **arguments) as engine:
        assert answers == _answers(engine, [prompt, PROMPTS[0]])


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
