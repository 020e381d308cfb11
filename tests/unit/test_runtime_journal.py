"""What FluxRuntime hands to the journal: each request once, when its routes stand.

Oracle: the routes that each step was told to decide. Pinned: the last request's routes arrive with
vLLM's empty step, though no step with rows follows.
"""

import math
from types import SimpleNamespace

import numpy as np

from tests.unit.test_runtime import FULL, OPEN, SPARSE, decide, make, run, step


class Journal:
    """Stands in for RouteJournal."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int, list[int], list[float]]] = []

    def append(
        self, request_id: str, prompt_tokens: int, routes: np.ndarray, full_probability: np.ndarray
    ) -> None:
        p_full = full_probability.astype(float).round(1).tolist()
        self.requests.append((request_id, prompt_tokens, routes.tolist(), p_full))


def journalled(policy: str = "router"):
    runtime = make(policy)
    runtime.journal = Journal()  # type: ignore[assignment]
    return runtime, runtime.journal.requests  # type: ignore[union-attr]


def test_each_request_once_when_its_prompt_is_complete() -> None:
    runtime, requests = journalled()
    run(runtime, step(("a", 0, 5, 9)), {"a": [FULL, FULL, FULL]})
    assert requests == []
    run(runtime, step(("a", 5, 4, 9), ("b", 0, 2, 4)), {"a": [SPARSE, FULL, SPARSE]})
    run(runtime, step(("a", 9, 1, 9), ("b", 2, 2, 4)), {"b": [FULL, SPARSE, FULL]})
    run(runtime, step(("a", 10, 1, 9), ("b", 4, 1, 4)), {})
    runtime.finish(["a", "b"])
    assert [(name, length, routes) for name, length, routes, _ in requests] == [
        ("a", 9, [SPARSE, FULL, OPEN, SPARSE]),
        ("b", 4, [FULL, SPARSE, OPEN, FULL]),
    ]
    (first, *_) = requests
    assert first[3][:2] == [0.1, 0.9]
    assert math.isnan(first[3][2])


def test_policies_without_a_router_have_no_probability() -> None:
    runtime, requests = journalled("full")
    run(runtime, step(("a", 0, 9, 9)), {})
    ((_, _, routes, p_full),) = requests
    assert routes == [FULL, FULL, OPEN, FULL]
    assert all(math.isnan(p) for p in p_full)


def test_warm_up_is_left_out() -> None:
    runtime, requests = journalled()
    run(runtime, step(("_warmup_0_", 0, 4, 4), is_warmup=True), {})
    assert requests == []


def test_an_empty_step_counts_what_has_arrived_since() -> None:
    runtime, requests = journalled()
    runtime.begin_step(step(("a", 0, 4, 4)))
    decide(runtime, {"a": [FULL, FULL, FULL]})
    has_passed = False
    event = SimpleNamespace(query=lambda: has_passed, synchronize=lambda: None)
    read = type(runtime)._count_finished

    def count_late(wait: bool) -> None:
        """Make the step's values late, as a GPU's are."""
        for finished in runtime._pending:
            object.__setattr__(finished, "event", event)
        read(runtime, wait)

    runtime._count_finished = count_late  # type: ignore[method-assign]
    runtime.end_step()
    assert requests == []
    has_passed = True
    runtime.end_step()
    assert [name for name, *_ in requests] == ["a"]
