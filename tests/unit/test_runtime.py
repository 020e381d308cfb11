"""FluxRuntime: routes from the first chunk to the end of a request, and what is reported of them.

Oracle: routes written down by hand for each step; a recording reporter in place of the metrics.
Pinned: a settled request keeps its routes through preemption and recomputation; a slot that a new
request takes over says nothing of its former owner, in the table or in the numbers.
"""

from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.batch import Batch
from flux_vllm.config import FluxConfig
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route, full_probability
from flux_vllm.runtime import FluxRuntime, recent_decisions

CPU = torch.device("cpu")
L, H = 4, 8
ROUTED = (0, 1, 3)
OPEN, SPARSE, FULL = (int(r) for r in (Route.UNDECIDED, Route.SPARSE, Route.FULL))
INFO = RouterInfo(
    base_model="", num_layers=L, head_dim=H, pool_tokens=16, sink_tokens=32, window_tokens=128
)


class Recorder:
    """Stands in for RouteReporter."""

    def __init__(self) -> None:
        self.steps: list[tuple[tuple[str, ...], list[list[int]], list[bool]]] = []
        self.probabilities: list[list[list[float]]] = []

    def record(self, step: Batch, routes: np.ndarray, decided: np.ndarray) -> None:
        self.steps.append((step.request_ids, routes.tolist(), decided.tolist()))

    def flush(self) -> None:
        """Nothing waits here."""

    def record_probabilities(self, step: Batch, full_probability: np.ndarray) -> None:
        self.probabilities.append(full_probability.tolist())


def make(policy: str = "router", max_requests: int = 2, **config: Any) -> FluxRuntime:
    with_router = policy == "router"
    router = LayerRouter(L, H).requires_grad_(False) if with_router else None
    runtime = FluxRuntime(
        FluxConfig(policy=policy, **config),
        router,
        INFO if with_router else None,
        num_layers=L,
        routed_layers=ROUTED,
        max_requests=max_requests,
        device=CPU,
        reduce_mean=lambda tensor: tensor,
    )
    runtime.reporter = Recorder()  # type: ignore[assignment]
    return runtime


def step(*rows: tuple[str, int, int, int], is_warmup: bool = False) -> Batch:
    """Make a step of rows (request id, computed, scheduled, prompt_len)."""
    numbers = np.array([row[1:] for row in rows], dtype=np.int64).reshape(len(rows), 3)
    return Batch(
        request_ids=tuple(row[0] for row in rows),
        prompt_lens=numbers[:, 2],
        computed=numbers[:, 0],
        scheduled=numbers[:, 1],
        is_prefill=numbers[:, 0] < numbers[:, 2],
        is_warmup=is_warmup,
    )


def decide(runtime: FluxRuntime, routes: dict[str, list[int]]) -> None:
    """Decide routes as the layers would, by a router whose answer is written down."""
    for layer in ROUTED:
        for request_id, wanted in routes.items():
            slot = runtime.table.slot(request_id)
            index = ROUTED.index(layer)
            runtime.table.routes[slot, layer] = wanted[index]
            runtime.table.full_probability[slot, layer] = 0.9 if wanted[index] == FULL else 0.1


def run(runtime: FluxRuntime, context: Batch, routes: dict[str, list[int]]) -> np.ndarray:
    """Run one step. Returns: which rows were to be routed."""
    runtime.begin_step(context)
    to_route = runtime.current.to_route.copy()
    assert set(routes) <= {
        name for name, wanted in zip(context.request_ids, to_route, strict=True) if wanted
    }
    decide(runtime, routes)
    runtime.end_step()
    assert runtime.current is None
    return to_route


def recorded(runtime: FluxRuntime) -> list:
    return runtime.reporter.steps  # type: ignore[union-attr]


class TestDecide:
    def test_probability_and_route(self) -> None:
        runtime = make(threshold=0.45)
        runtime.begin_step(step(("a", 0, 5, 5), ("b", 0, 7, 7)))
        slots = torch.from_numpy(runtime.current.slots)
        pooled = torch.randn(2, H)
        runtime.decide(3, slots, pooled)
        expected = full_probability(runtime.router(3, pooled))
        assert torch.equal(runtime.table.full_probability[slots, 3], expected)
        assert runtime.table.routes[slots, 3].tolist() == (expected >= 0.45).int().tolist()
        assert (runtime.table.routes[slots][:, :3] == OPEN).all()

    def test_mean_over_ranks_comes_before_the_router(self) -> None:
        runtime = make()
        runtime.reduce_mean = lambda tensor: tensor + 3
        runtime.begin_step(step(("a", 0, 5, 5)))
        pooled = torch.randn(1, H)
        runtime.decide(0, torch.from_numpy(runtime.current.slots), pooled)
        expected = full_probability(runtime.router(0, pooled + 3))
        assert torch.equal(runtime.table.full_probability[runtime.current.slots, 0], expected)


class TestLifeOfARequest:
    def test_probabilities_of_rows_decided_in_the_step_are_counted(self) -> None:
        """Of routed layers alone: layer 2 keeps its window and has NaN."""
        runtime = make()
        run(runtime, step(("a", 0, 9, 9)), {"a": [SPARSE, FULL, FULL]})
        run(runtime, step(("a", 9, 1, 9), ("b", 0, 4, 4)), {"b": [FULL, FULL, SPARSE]})
        run(runtime, step(("a", 10, 1, 9), ("b", 4, 1, 4)), {})
        found = runtime.reporter.probabilities  # type: ignore[union-attr]
        expected = [[[0.1, 0.9, 0.9]], [[0.9, 0.9, 0.1]]]
        assert [np.round(rows, 1).tolist() for rows in found] == expected

    def test_policies_without_a_router_have_no_probabilities(self) -> None:
        runtime = make("full")
        run(runtime, step(("a", 0, 9, 9)), {})
        assert runtime.reporter.probabilities == []  # type: ignore[union-attr]

    def test_chunks_then_decode(self) -> None:
        runtime = make()
        routes = [{"a": [FULL, FULL, FULL]}, {"a": [SPARSE, FULL, SPARSE]}]
        assert run(runtime, step(("a", 0, 64, 100)), routes[0]).tolist() == [True]
        assert run(runtime, step(("a", 64, 36, 100)), routes[1]).tolist() == [True]
        for position in (100, 101):
            assert run(runtime, step(("a", position, 1, 100)), {}).tolist() == [False]
        assert recorded(runtime) == [
            (("a",), [[FULL, FULL, FULL]], [False]),
            (("a",), [[SPARSE, FULL, SPARSE]], [True]),
            (("a",), [[SPARSE, FULL, SPARSE]], [False]),
            (("a",), [[SPARSE, FULL, SPARSE]], [False]),
        ]

    def test_one_token_tail_completes_the_prompt(self) -> None:
        runtime = make()
        run(runtime, step(("a", 0, 64, 65)), {"a": [FULL] * 3})
        assert run(runtime, step(("a", 64, 1, 65)), {"a": [SPARSE] * 3}).tolist() == [True]
        assert recorded(runtime)[-1] == (("a",), [[SPARSE] * 3], [True])

    @pytest.mark.parametrize("chunk", [200, 64], ids=["one-chunk", "chunks"])
    def test_resumed_request_keeps_its_routes(self, chunk: int) -> None:
        """Preempted after its prompt: it recomputes prompt and outputs under the same routes."""
        runtime = make()
        run(runtime, step(("a", 0, 100, 100)), {"a": [SPARSE, FULL, SPARSE]})
        run(runtime, step(("a", 100, 1, 100)), {})
        for start in range(0, 130, chunk):
            context = step(("a", start, min(chunk, 130 - start), 100))
            context.is_prefill[:] = True  # outputs too are recomputed as prefill
            assert run(runtime, context, {}).tolist() == [False]
        assert all(routes == [[SPARSE, FULL, SPARSE]] for _, routes, _ in recorded(runtime))
        assert sum(decided[0] for _, _, decided in recorded(runtime)) == 1

    def test_preempted_before_its_prompt_was_complete(self) -> None:
        runtime = make()
        run(runtime, step(("a", 0, 64, 100)), {"a": [FULL] * 3})
        assert run(runtime, step(("a", 0, 100, 100)), {"a": [SPARSE] * 3}).tolist() == [True]
        assert recorded(runtime)[-1][2] == [True]

    def test_longer_prompt_under_the_same_id(self) -> None:
        """A session that takes more input is a new prompt."""
        runtime = make()
        run(runtime, step(("a", 0, 50, 50)), {"a": [FULL] * 3})
        assert run(runtime, step(("a", 50, 30, 80)), {"a": [SPARSE] * 3}).tolist() == [True]
        assert recorded(runtime)[-1] == (("a",), [[SPARSE] * 3], [True])

    def test_rows_in_another_order(self) -> None:
        runtime = make()
        prompts = {"a": [FULL, SPARSE, FULL], "b": [SPARSE, SPARSE, FULL]}
        run(runtime, step(("a", 0, 9, 9), ("b", 0, 8, 8)), prompts)
        run(runtime, step(("b", 8, 1, 8), ("c", 0, 3, 3), ("a", 9, 1, 9)), {"c": [SPARSE] * 3})
        assert recorded(runtime)[-1] == (
            ("b", "c", "a"),
            [prompts["b"], [SPARSE] * 3, prompts["a"]],
            [False, True, False],
        )


class TestSlots:
    def test_finished_requests_leave_nothing(self) -> None:
        runtime = make()
        for index in range(50):
            name = f"r{index}"
            run(runtime, step((name, 0, 9, 9)), {name: [FULL] * 3})
            runtime.finish([name])
            assert runtime.status()["live_requests"] == 0
        assert len(runtime.table.settled_prompt_len) == 2

    def test_abort_before_the_prompt_is_complete(self) -> None:
        runtime = make()
        run(runtime, step(("a", 0, 64, 100)), {"a": [FULL] * 3})
        runtime.finish(["a"])
        assert not any(decided[0] for _, _, decided in recorded(runtime))
        assert runtime.status()["live_requests"] == 0
        assert runtime.status()["recent"] == []

    def test_more_requests_than_slots(self) -> None:
        """Preempted requests keep their slots, so more may live than run."""
        runtime = make(max_requests=1)
        with torch.inference_mode():
            runtime.begin_step(step(("a", 0, 5, 5), ("b", 0, 5, 5)))
            decide(runtime, {"a": [FULL, FULL, SPARSE]})
        runtime.end_step()
        slot = runtime.table.slot("a")
        runtime.finish(["a"])
        capacity = len(runtime.table.routes)
        names = [f"c{index}" for index in range(capacity - 1)]
        runtime.begin_step(step(("b", 5, 1, 5), *((name, 0, 5, 5) for name in names)))
        assert slot in {runtime.table.slot(name) for name in names}
        assert (runtime.table.routes[slot] == OPEN).all()
        assert len(runtime.table.routes) == capacity

    def test_deferred_work_is_done_once_before_the_step_ends(self) -> None:
        runtime = make()
        runtime.begin_step(step(("a", 0, 5, 5)))
        calls: list[bool] = []
        runtime.defer(lambda: calls.append(runtime.current is not None))
        runtime.do_deferred()
        assert calls == [True]
        runtime.defer(lambda: decide(runtime, {"a": [FULL, SPARSE, FULL]}))
        runtime.end_step()
        assert calls == [True]
        assert recorded(runtime) == [(("a",), [[FULL, SPARSE, FULL]], [True])]

    def test_step_that_was_not_sampled_from_ends_before_the_next(self) -> None:
        runtime = make()
        runtime.begin_step(step(("a", 0, 5, 5)))
        runtime.defer(lambda: decide(runtime, {"a": [FULL, SPARSE, FULL]}))
        runtime.begin_step(step(("a", 5, 1, 5)))
        assert not runtime.current.to_route.any()
        runtime.end_step()
        assert [routes for _, routes, _ in recorded(runtime)] == [[[FULL, SPARSE, FULL]]] * 2

    def test_abandoned_step(self) -> None:
        runtime = make()
        runtime.begin_step(step(("a", 0, 9, 9)))
        runtime.abandon_step()
        runtime.end_step()
        assert recorded(runtime) == []
        assert run(runtime, step(("a", 0, 9, 9)), {"a": [FULL] * 3}).tolist() == [True]


class TestFixedRoutes:
    @pytest.mark.parametrize(
        ("config", "routes"),
        [
            ({"policy": "full"}, [FULL, FULL, OPEN, FULL]),
            (
                {"policy": "sparse", "sink_tokens": 1, "window_tokens": 2},
                [SPARSE, SPARSE, OPEN, SPARSE],
            ),
            (
                {
                    "policy": "static",
                    "sparse_layers": (1,),
                    "sink_tokens": 1,
                    "window_tokens": 2,
                },
                [FULL, SPARSE, OPEN, FULL],
            ),
            (
                {"policy": "static", "sparse_layers": (), "sink_tokens": 1, "window_tokens": 2},
                [FULL, FULL, OPEN, FULL],
            ),
        ],
        ids=["full", "sparse", "static-1", "static-none"],
    )
    def test_policy(self, config: dict, routes: list[int]) -> None:
        """Layer 2 keeps a sliding window of its own and has no route."""
        runtime = make(**config)
        assert runtime.fixed_routes == routes
        runtime.begin_step(step(("a", 0, 9, 9), ("b", 0, 3, 8)))
        assert runtime.table.routes[runtime.current.slots].tolist() == [routes, routes]
        runtime.end_step()
        kept = [routes[layer] for layer in ROUTED]
        assert recorded(runtime) == [(("a", "b"), [kept, kept], [True, False])]

    def test_new_pattern_is_for_all_requests(self) -> None:
        runtime = make("static", sparse_layers=(1,), sink_tokens=1, window_tokens=2)
        run(runtime, step(("a", 0, 9, 9)), {})
        runtime.fix_routes((0, 3))
        run(runtime, step(("a", 9, 1, 9), ("b", 0, 9, 9)), {})
        assert recorded(runtime)[-1][1] == [[SPARSE, FULL, SPARSE]] * 2

    def test_router_has_none(self) -> None:
        runtime = make()
        assert runtime.fixed_routes is None
        with pytest.raises(AssertionError):
            runtime.fix_routes((0,))


class TestStatus:
    def test_recent_decisions(self) -> None:
        runtime = make()
        run(runtime, step(("a", 0, 64, 100)), {"a": [FULL] * 3})
        run(runtime, step(("a", 64, 36, 100), ("b", 0, 7, 7)), {"a": [SPARSE, FULL, SPARSE]})
        status = runtime.status()
        assert status["routed_layers"] == list(ROUTED)
        assert [entry["request_id"] for entry in status["recent"]] == ["a", "b"]
        entry = status["recent"][0]
        assert entry["prompt_tokens"] == 100
        assert entry["routes"] == [SPARSE, FULL, OPEN, SPARSE]
        assert entry["full_probability"][:2] == pytest.approx([0.1, 0.9])
        assert entry["full_probability"][2] != entry["full_probability"][2]  # NaN

    def test_recent_is_bounded(self) -> None:
        runtime = make("full")
        for index in range(300):
            name = f"r{index}"
            run(runtime, step((name, 0, 9, 9)), {})
            runtime.finish([name])
        names = [entry["request_id"] for entry in runtime.status()["recent"]]
        assert names == [f"r{i}" for i in range(300 - len(names), 300)]
        assert len(names) == 256

    def test_warmup_is_not_recent(self) -> None:
        runtime = make("full")
        run(runtime, step(("_warmup_0", 0, 9, 9), is_warmup=True), {})
        assert runtime.status()["recent"] == []

    def test_offline(self) -> None:
        runtime = make("full")
        run(runtime, step(("a", 0, 9, 9)), {})

        class LLM:
            def collective_rpc(self, name: str) -> list[Any]:
                assert name == "flux_status"
                return [runtime.status()]

        (decision,) = recent_decisions(LLM())
        assert decision == runtime.recent[0]
