"""Two engines in one process: each counts what it did, under its own model name.

Oracle: requests times layers, and the keys of policy `full` counted by hand.
"""

import pytest
from prometheus_client import generate_latest

from tests.helpers.engine import Engine
from tests.helpers.metrics import parse, total
from tests.helpers.models import random_prompt

pytestmark = pytest.mark.vllm

LAYERS = 4
SIZES = {"sink_tokens": 16, "window_tokens": 32}


def _counted(model_name: str, name: str, **labels: str) -> float:
    samples = parse(generate_latest().decode())
    return total(samples, name, model_name=model_name, **labels)


def test_two_engines_at_once_and_after_one_ended(tiny_model):
    full = Engine(tiny_model, {"policy": "full"}, served_model_name="two-full")
    with Engine(tiny_model, {"policy": "sparse"} | SIZES, served_model_name="two-sparse") as sparse:
        full.generate([random_prompt(50, seed=1)], 3)
        sparse.generate([random_prompt(n, seed=n) for n in (60, 70)], 2)
        _assert_counts(1, 2)
        full.generate([random_prompt(20, seed=2)], 1)
        _assert_counts(2, 2)
    full.close()
    _assert_counts(2, 2)
    keys = sum(range(1, 51)) + sum(range(51, 53)) + sum(range(1, 21))
    for what in ("attended", "context"):
        assert _counted("two-full", f"flux_{what}_tokens_total") == LAYERS * keys
    attended, context = (
        _counted("two-sparse", f"flux_{what}_tokens_total") for what in ("attended", "context")
    )
    assert attended < context
    with Engine(tiny_model, {"policy": "full"}, served_model_name="two-full") as again:
        again.generate([random_prompt(50, seed=3)], 1)
        _assert_counts(3, 2)


def _assert_counts(full: int, sparse: int) -> None:
    decisions = "flux_route_decisions_total"
    assert _counted("two-full", decisions, route="full") == LAYERS * full
    assert _counted("two-full", decisions, route="sparse") == 0
    assert _counted("two-sparse", decisions, route="sparse") == LAYERS * sparse
    assert _counted("two-sparse", decisions, route="full") == 0
