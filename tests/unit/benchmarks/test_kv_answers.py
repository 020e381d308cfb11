"""Answers with and without freeing, compared; mixed requests and what they leave.

Oracle: shares counted by hand; a made-up engine.
"""

from types import SimpleNamespace

import pytest

from benchmarks import prompt_load
from benchmarks.bench_kv_answers import compare, flux_config, freeing_order, sparse_share
from flux_vllm.config import FluxConfig
from flux_vllm.router.checkpoint import read_router
from tests.conftest import REPOSITORY

S, F, U = 0, 1, -1


def test_freeing_order_puts_the_seldom_full_first():
    routes = [[F, S, F, U], [F, S, S, U], [F, S, S, U]]
    assert freeing_order(routes) == (1, 2, 0, 3)
    assert sparse_share(routes) == 5 / 12


def test_compare_counts_answers_and_prefixes():
    found = compare([[1, 2, 3], [1, 2, 3, 4], [5]], [[1, 2, 3], [1, 2, 9, 9], [6]])
    assert found == {"equal_answers": 1 / 3, "equal_prefix": pytest.approx((1 + 0.5 + 0) / 3)}
    assert compare([[1, 2]], [[1, 2, 3, 4]]) == {"equal_answers": 0.0, "equal_prefix": 0.5}


@pytest.mark.parametrize("pattern", [None, "streaming"])
@pytest.mark.parametrize("early", [None, 0])
def test_keys_of_a_router_that_ships_can_be_given_back(pattern, early):
    """Its file lets an answer's first tokens attend to everything."""
    router = REPOSITORY / "flux_vllm" / "data" / "qwen2.5-coder-1.5b-instruct"
    _, info = read_router(router)
    assert info.full_decode_tokens > 0
    asked = {"threshold": 0.7, "pattern": pattern, "full_decode_tokens": early}
    flux = flux_config(SimpleNamespace(router=router, **asked))
    config = FluxConfig(**flux, free_kv=True)
    assert config.full_decode(info) == (info.full_decode_tokens if early is None else early)
    assert config.threshold == 0.7
    assert config.pattern_name(info) == (pattern or info.sparse_pattern)


class _Engine:
    """Answers two requests at a time, a token a step: the prompt's length, then its successors."""

    def __init__(self):
        self.waiting, self.running, self.aborted = [], [], []
        free = SimpleNamespace(blocks=range(11), get_num_free_blocks=lambda: 10)
        self.kv_cache_manager = SimpleNamespace(block_pool=free)

    def add_request(self, name, prompt, tokens):
        self.waiting.append(
            SimpleNamespace(name=name, ids=[len(prompt["prompt_token_ids"])], n=tokens)
        )

    def abort_request(self, names):
        self.aborted += names
        self.waiting, self.running = (
            [r for r in queue if r.name not in names] for queue in (self.waiting, self.running)
        )

    def has_unfinished_requests(self):
        return bool(self.waiting or self.running)

    def _preempt_request(self, request):
        pass

    def step(self):
        while self.waiting and len(self.running) < 2:
            self.running.append(self.waiting.pop(0))
        outputs = []
        for request in list(self.running):
            done = len(request.ids) == request.n
            answer = SimpleNamespace(token_ids=tuple(request.ids))
            outputs.append(
                SimpleNamespace(request_id=request.name, finished=done, outputs=[answer])
            )
            if done:
                self.running.remove(request)
            else:
                request.ids.append(request.ids[-1] + 1)
        return outputs


def test_answer_prompts_keeps_their_order():
    engine = _Engine()
    found = prompt_load.answer_prompts(engine, engine, [[0] * 7, [0] * 3, [0] * 5], 3)
    assert found["tokens"] == [[7, 8, 9], [3, 4, 5], [5, 6, 7]]
    assert found["most_running"] == 2
    assert 1 < found["mean_running"] < 2, "both end in one step, and one waits"
    assert found["preemptions"] == 0


def test_soak_aborts_and_says_what_is_left():
    engine = _Engine()
    found = prompt_load.soak(engine, engine, [[0] * 7, [0] * 3], 60, 0, lambda tokens: tokens)
    assert found["requests"] == 60
    assert found["aborted"] == len(engine.aborted) > 0
    assert (found["blocks"], found["free_blocks"]) == (10, 10)
    assert not engine.has_unfinished_requests()
