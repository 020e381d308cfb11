"""Routes beside a step's tokens, from the worker to the scheduler.

Oracle: what was put in, after vLLM's pickling.
"""

import pickle
from types import SimpleNamespace

import pytest

from tests.unit.routing.worker import batch, begin, make, run

pytestmark = pytest.mark.vllm


def _decided():
    """Run a step in which two of three requests got their routes."""
    runtime = make(answers={"a": [0, 1, 0], "c": [1, 0, 0]}, max_requests=4)
    run(runtime, batch(("b", 0, 5, 5)))
    begin(runtime, batch(("a", 0, 50, 50), ("b", 5, 1, 5), ("c", 0, 9, 90)))
    return runtime.end_step()


def _output():
    from vllm.v1.outputs import ModelRunnerOutput

    return ModelRunnerOutput(["a", "b", "c"], {"a": 0, "b": 1, "c": 2}, [[5], [6], []])


def _check(output):
    from flux_vllm.kv.channel import decided_routes

    routes = decided_routes(output)
    assert {name: list(row) for name, row in routes.items()} == {
        "a": [0, 1, -1, 0],
        "c": [1, 0, -1, 0],
    }
    assert output.sampled_token_ids == [[5], [6], []]


def test_routes_arrive_with_the_output():
    from flux_vllm.kv.channel import send_routes

    output = _output()
    assert send_routes(output, _decided()) is output
    _check(pickle.loads(pickle.dumps(output)))


def test_routes_arrive_with_an_output_on_its_way():
    """Nothing is waited for before the executor asks for the output; then for tokens and routes."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    from flux_vllm.kv.channel import send_routes

    events = []

    class OnItsWay(AsyncModelRunnerOutput):
        def get_output(self):
            events.append("tokens")
            return _output()

        def get_kv_connector_output(self):
            return "a connector's"

    decided = _decided()
    event = SimpleNamespace(synchronize=lambda: events.append("routes"))
    object.__setattr__(decided, "event", event)
    output = send_routes(OnItsWay(), decided)
    assert isinstance(output, AsyncModelRunnerOutput)
    assert output.get_kv_connector_output() == "a connector's"
    assert not events
    _check(pickle.loads(pickle.dumps(output.get_output())))
    assert events == ["tokens", "routes"]


def test_other_outputs_are_no_place_for_routes():
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    from flux_vllm.kv.channel import decided_routes, send_routes

    assert decided_routes(EMPTY_MODEL_RUNNER_OUTPUT) == {}
    with pytest.raises(AttributeError):
        send_routes(None, _decided())


def test_a_step_without_decisions_sends_nothing():
    runtime = make(answers={"a": [0, 1, 0]})
    run(runtime, batch(("a", 0, 50, 50)))
    begin(runtime, batch(("a", 50, 1, 50)))
    assert runtime.end_step() is None
    begin(runtime, batch(("a", 51, 1, 50)))
    runtime.reads_back = False  # as on all tensor-parallel ranks but the first
    assert runtime.end_step() is None
