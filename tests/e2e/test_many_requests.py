"""Many requests at once, aborted ones among them: nothing is miscounted and nothing stays behind.

Oracle: vLLM's own scheduler log (which prompts were completed) and the steps' arithmetic.
"""

import random

import pytest
from prometheus_client import generate_latest

from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.metrics import parse, total
from tests.helpers.models import random_prompt
from tests.helpers.reference import SparsePattern
from tests.helpers.replay import assert_same, replay

pytestmark = pytest.mark.vllm

NUM_REQUESTS = 200


def _metrics():
    return parse(generate_latest().decode())


def _run_with_aborts(engine, chooser):
    """Feed requests to the engine bit by bit, aborting one in three at a random moment."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    waiting = list(range(NUM_REQUESTS))
    prompt_lens, aborted, alive = {}, set(), []
    while waiting or core.has_unfinished_requests():
        for number in [waiting.pop() for _ in range(min(len(waiting), chooser.randrange(12)))]:
            name = f"many-{number}"
            prompt = random_prompt(chooser.randrange(1, 320), seed=number)
            prompt_lens[name] = len(prompt)
            parameters = SamplingParams(
                temperature=0,
                max_tokens=chooser.randrange(1, 20),
                ignore_eos=True,
                detokenize=False,
            )
            core.add_request(name, {"prompt_token_ids": prompt}, parameters)
            alive.append(name)
        if alive and chooser.random() < 0.4:
            victim = alive.pop(chooser.randrange(len(alive)))
            core.abort_request([victim])
            aborted.add(victim)
        core.step()
    return prompt_lens, aborted


def test_decisions_equal_requests_whose_routes_mattered(tiny_model):
    with Engine(
        tiny_model,
        {},
        served_model_name="many",
        max_num_seqs=32,
        max_num_batched_tokens=256,
        enable_prefix_caching=True,
    ) as engine:
        prompt_lens, aborted = _run_with_aborts(engine, random.Random(0))
        reach = SINK_TOKENS + WINDOW_TOKENS
        decided = sum(
            max(prompt_lens[request_id.rsplit("-", 1)[0]], *(s + n for s, n, _ in steps)) > reach
            for request_id, steps in engine._steps.items()
        )
        assert len(aborted) > 20
        assert NUM_REQUESTS / 4 < decided < NUM_REQUESTS
        engine.generate([[1, 2, 3]], 1)  # tells the worker of the last requests' end
        metrics = _metrics()
        layers = engine.runtime.routed_layers
        status = engine.worker.flux_status()
    counted = total(metrics, "flux_route_decisions_total", model_name="many")
    assert counted == decided * len(layers)
    for layer in layers:
        per_layer = total(
            metrics, "flux_route_decisions_total", model_name="many", layer=str(layer)
        )
        assert per_layer == decided
    ratios = total(metrics, "flux_request_sparse_layers_ratio_count", model_name="many")
    assert ratios == decided
    assert total(metrics, "flux_unrouted_rows_total", model_name="many") == 0
    # The request just made ends with the engine's next step, which never comes.
    assert status["live_requests"] <= 1


def test_counters_equal_what_requests_did(tiny_model):
    """Attended and context tokens of a static policy, against a loop over every query."""
    flux = {
        "policy": "static",
        "sparse_layers": [0, 1, 3],
        "sink_tokens": SINK_TOKENS,
        "window_tokens": WINDOW_TOKENS,
    }
    block_size = 32
    with Engine(
        tiny_model,
        flux,
        served_model_name="static",
        block_size=block_size,
        max_num_batched_tokens=128,
    ) as engine:
        answers = engine.generate([random_prompt(n, seed=n) for n in (20, 170, 400)], 40)
        engine.worker.flux_status()  # no step follows that would count what waits
        metrics = _metrics()
    expected = {"prefill": [0, 0], "decode": [0, 0]}
    sink_end = -(-SINK_TOKENS // block_size) * block_size
    for answer in answers:
        for start, length, phase in answer.steps:
            for position in range(start, start + length):
                first = position - WINDOW_TOKENS + 1
                if phase == "prefill":
                    sparse = sum(k < SINK_TOKENS or k >= first for k in range(position + 1))
                else:
                    edge = max(first, 0) // block_size * block_size
                    sparse = sum(k < sink_end or k >= edge for k in range(position + 1))
                expected[phase][0] += 3 * sparse + position + 1
                expected[phase][1] += 4 * (position + 1)
    for phase, (attended, context) in expected.items():
        labels = {"model_name": "static", "phase": phase}
        assert total(metrics, "flux_attended_tokens_total", **labels) == attended
        assert total(metrics, "flux_context_tokens_total", **labels) == context
    for layer in range(4):
        route = "full" if layer == 2 else "sparse"
        labels = {"model_name": "static", "layer": str(layer), "route": route}
        assert total(metrics, "flux_route_decisions_total", **labels) == 3
    assert total(metrics, "flux_request_sparse_layers_ratio_sum", model_name="static") == 3 * 0.75


def test_blocks_shared_in_the_same_step(tiny_model, reference, reference_router):
    """A request may read blocks that another request computes in the very same step."""
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 32)
    prompt = random_prompt(400, seed=1)
    longer = prompt[:352] + random_prompt(77, seed=2)
    with Engine(tiny_model, {}, block_size=32, enable_prefix_caching=True) as engine:
        first, second = engine.generate([prompt, longer], 24)
    assert second.cached_tokens == 352
    assert first.steps[0][:2] == (0, 400)
    source = replay(reference, first, pattern, router=reference_router)
    assert_same(first, source)
    request = replay(reference, second, pattern, router=reference_router, history=source.history)
    assert_same(second, request)
    assert second.routes == request.routes
