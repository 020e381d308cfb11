"""FluxRuntime: when routes are decided, that they stand, and what is reported of them.

Oracle: routes written down by hand for each request; a recording reporter in place of the metrics.
Pinned: a request keeps its routes through preemption and recomputation; a slot that a new request
takes over says nothing of its former owner, in the table or in the numbers.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.errors import FluxConfigError, UnsupportedConfigurationError
from flux_vllm.routing.decode_counts import DecodeCounts, DecodeKeys
from flux_vllm.routing.prompts import Prompt
from flux_vllm.routing.readback import PendingReadback
from flux_vllm.routing.runtime import recent_decisions
from tests.unit.routing.worker import (
    CPU,
    FULL,
    INFO,
    OPEN,
    REACH,
    ROUTED,
    SPARSE,
    asked,
    batch,
    begin,
    make,
    recorded,
    run,
)

A, B, C = [SPARSE, FULL, SPARSE], [FULL, SPARSE, SPARSE], [SPARSE, SPARSE, FULL]
ANSWERS = {"a": A, "b": B, "c": C}
NONE = [OPEN] * 3


class TestLifeOfARequest:
    def test_long_prompt_is_probed_with_its_first_chunk(self) -> None:
        runtime = make(answers=ANSWERS)
        assert run(runtime, batch(("a", 0, 16, 100))) == ["a"]
        for start, tokens in ((16, 64), (80, 20), (100, 1), (101, 1)):
            assert run(runtime, batch(("a", start, tokens, 100))) == []
        assert asked(runtime) == [("a", 100)]
        assert [routes for _, routes, _ in recorded(runtime)] == [[A]] * 5
        assert [decided for *_, decided in recorded(runtime)] == [[True]] + [[False]] * 4

    def test_prefix_hit_changes_nothing(self) -> None:
        runtime = make(answers=ANSWERS)
        assert run(runtime, batch(("a", 96, 4, 100))) == ["a"]

    def test_short_prompt_is_probed_when_its_context_outgrows_the_reach(self) -> None:
        runtime = make(answers=ANSWERS)
        assert run(runtime, batch(("a", 0, 10, 10))) == []
        for end in range(11, REACH + 1):
            assert run(runtime, batch(("a", end - 1, 1, 10))) == []
        assert run(runtime, batch(("a", REACH, 1, 10))) == ["a"]
        assert run(runtime, batch(("a", REACH + 1, 1, 10))) == []
        assert asked(runtime) == [("a", 10)]
        routes = [found for _, (found,), _ in recorded(runtime)]
        assert routes == [NONE] * (REACH - 9) + [A, A]

    def test_prompt_of_just_the_reach(self) -> None:
        runtime = make(answers=ANSWERS)
        assert run(runtime, batch(("a", 0, REACH, REACH))) == []
        assert run(runtime, batch(("b", 0, REACH + 1, REACH + 1))) == ["b"]

    def test_resumed_request_keeps_its_routes(self) -> None:
        """Preempted, and announced anew as model runner V2 has it, in the middle of its text."""
        runtime = make(answers=ANSWERS)
        run(runtime, batch(("a", 0, 100, 100)))
        run(runtime, batch(("a", 100, 1, 100)))
        for start in (0, 64):
            step = batch(("a", start, 64, 100))
            step.is_prefill[:] = True  # outputs too are recomputed as prefill
            assert run(runtime, step, announced="a") == []
        assert len(asked(runtime)) == 1
        assert all(routes == [A] for _, routes, _ in recorded(runtime))

    def test_resumed_before_it_was_probed(self) -> None:
        runtime = make(answers=ANSWERS)
        run(runtime, batch(("a", 0, 10, 10)))
        for end in range(11, REACH + 1):
            run(runtime, batch(("a", end - 1, 1, 10)))
        assert run(runtime, batch(("a", 0, 20, 10)), announced="a") == []
        assert run(runtime, batch(("a", 20, REACH - 19, 10))) == ["a"]

    def test_longer_prompt_under_the_same_id(self) -> None:
        """A session that takes more input is a new prompt."""
        runtime = make(answers=dict(ANSWERS))
        run(runtime, batch(("a", 0, 50, 50)))
        runtime.probe.answers["a"] = C  # type: ignore[union-attr]
        assert run(runtime, batch(("a", 50, 30, 80)), announced="a") == ["a"]
        assert asked(runtime) == [("a", 50), ("a", 80)]
        assert recorded(runtime)[-1] == (("a",), [C], [True])

    def test_rows_in_another_order(self) -> None:
        runtime = make(answers=ANSWERS)
        assert run(runtime, batch(("a", 0, 9, 90), ("b", 0, 8, 80))) == ["a", "b"]
        assert run(runtime, batch(("b", 8, 1, 80), ("c", 0, 3, 70), ("a", 9, 1, 90))) == ["c"]
        assert recorded(runtime)[-1] == (("b", "c", "a"), [B, C, A], [False, True, False])

    def test_prompt_that_is_no_token_ids_is_full_and_counted(self) -> None:
        runtime = make(answers=ANSWERS)
        assert run(runtime, batch(("a", 0, 50, 50)), readable=False) == ["a"]
        assert asked(runtime) == []
        assert recorded(runtime)[-1] == (("a",), [[FULL] * 3], [True])
        assert runtime.table.routes[runtime.table.slot("a")].tolist() == [FULL, FULL, OPEN, FULL]
        assert runtime.reporter.unread == 1  # type: ignore[union-attr]
        assert runtime.reporter.probabilities == [[]]  # type: ignore[union-attr]

    def test_unread_prompt_leaves_always_sparse_layers_so(self) -> None:
        """Their keys are given back whoever asks."""
        runtime = make(answers=ANSWERS, info=replace(INFO, always_sparse=(0, 3)))
        run(runtime, batch(("a", 0, 50, 50)), readable=False)
        routes = runtime.table.routes[runtime.table.slot("a")].tolist()
        assert routes == [SPARSE, FULL, OPEN, SPARSE]


class TestNumbers:
    def test_probabilities_of_routed_layers(self) -> None:
        """Layer 2 keeps its window and has NaN."""
        runtime = make(answers=ANSWERS)
        run(runtime, batch(("a", 0, 90, 90)))
        run(runtime, batch(("a", 90, 1, 90), ("b", 0, 40, 40)))
        run(runtime, batch(("a", 91, 1, 90), ("b", 40, 1, 40)))
        found = runtime.reporter.probabilities  # type: ignore[union-attr]
        expected = [[[0.1, 0.9, 0.1]], [[0.9, 0.1, 0.1]]]
        assert [np.round(rows, 1).tolist() for rows in found] == expected

    def test_policies_without_a_router_have_none(self) -> None:
        runtime = make("full")
        run(runtime, batch(("a", 0, 90, 90)))
        assert runtime.reporter.probabilities == []  # type: ignore[union-attr]

    def test_journal_gets_each_request_once(self) -> None:
        runtime = make(answers=ANSWERS)
        entries: list[tuple] = []
        append = lambda *entry: entries.append(entry)  # noqa: E731
        runtime.journal = SimpleNamespace(append=append)  # type: ignore[assignment]
        run(runtime, batch(("a", 0, 50, 90)))
        run(runtime, batch(("a", 50, 40, 90), ("b", 0, 2, 40), ("c", 0, 5, 5)))
        run(runtime, batch(("a", 90, 1, 90), ("b", 2, 38, 40), ("c", 5, 1, 5)))
        found = [(name, length, routes.tolist()) for name, length, routes, _ in entries]
        assert found == [("a", 90, [*A[:2], OPEN, A[2]]), ("b", 40, [*B[:2], OPEN, B[2]])]
        p_full = entries[0][3]
        assert p_full[:2] == pytest.approx([0.1, 0.9])
        assert math.isnan(p_full[2])

    def test_an_empty_step_counts_what_has_arrived_since(self) -> None:
        runtime = make(answers=ANSWERS)
        begin(runtime, batch(("a", 0, 40, 40)))
        has_passed = False
        event = SimpleNamespace(query=lambda: has_passed, synchronize=lambda: None)
        count = runtime._count_pending

        def count_late(wait: bool) -> None:
            """Make the step's values late, as a GPU's are."""
            for pending in runtime._pending:
                object.__setattr__(pending, "event", event)
            count(wait)

        runtime._count_pending = count_late  # type: ignore[method-assign]
        runtime.end_step()
        assert recorded(runtime) == []
        has_passed = True
        runtime.end_step()
        assert recorded(runtime) == [(("a",), [A], [True])]


class TestCountedOnTheDevice:
    """Kernels count decode steps where a backend gave the runtime its counts."""

    def make(self) -> Any:
        runtime = make(answers=ANSWERS)
        runtime.decode_counts = DecodeCounts(4, CPU)
        return runtime

    def test_only_steps_with_prefill_or_decisions_are_noted(self) -> None:
        runtime = self.make()
        run(runtime, batch(("a", 0, 90, 90), ("b", 0, 9, 9)))
        for end in range(91, 100):
            run(runtime, batch(("a", end - 1, 1, 90), ("b", end - 82, 1, 9)))
        assert recorded(runtime) == [(("a", "b"), [A, NONE], [True, False])]
        assert not runtime._pending

    def test_a_decision_in_a_decode_step_counts_no_keys(self) -> None:
        runtime = self.make()
        run(runtime, batch(("a", 0, 10, 10)))
        for end in range(11, REACH + 3):
            run(runtime, batch(("a", end - 1, 1, 10)))
        assert recorded(runtime)[1:] == [(("a",), [A], [True])]
        assert runtime.reporter.keys_counted == [True, False]  # type: ignore[union-attr]

    def test_totals_reach_the_metrics(self) -> None:
        runtime = self.make()
        run(runtime, batch(("a", 0, 90, 90)))
        runtime.decode_counts.totals[:, 0] = torch.tensor([7, 9, 1])
        runtime.status()
        runtime.decode_counts.totals[:, 1] = torch.tensor([1, 2, 0])
        runtime.end_step()  # vLLM's empty step
        found = runtime.reporter.decode_keys  # type: ignore[union-attr]
        assert found == [DecodeKeys(7, 9, 1), DecodeKeys(1, 2, 0)]

    def test_warm_up_counts_nowhere(self) -> None:
        runtime = self.make()
        runtime.is_warming_up = True
        run(runtime, batch(("a", 0, 9, 9), is_warmup=True))
        runtime.decode_counts.totals += 5
        runtime.end_warm_up()
        assert not runtime.is_warming_up
        runtime.decode_counts.totals[:, 0] += 2
        runtime.status()
        found = runtime.reporter.decode_keys  # type: ignore[union-attr]
        assert found == [DecodeKeys(2, 2, 2)]


class TestRowsThatStay:
    def test_slots_are_looked_up_when_something_changed(self) -> None:
        """The same array says that nothing did."""
        runtime = make(answers=ANSWERS)
        seen = []
        for step in (
            batch(("a", 0, 90, 90), ("b", 0, 8, 8)),
            batch(("a", 90, 1, 90), ("b", 8, 1, 8)),
            batch(("a", 91, 1, 90), ("b", 9, 1, 8)),
            batch(("b", 10, 1, 8), ("a", 92, 1, 90)),
            batch(("b", 11, 1, 8)),
        ):
            begin(runtime, step)
            seen.append(runtime.current.slots)
            runtime.end_step()
        assert seen[1] is seen[0]
        assert seen[2] is seen[0]
        assert seen[3].tolist() == seen[0][::-1].tolist()
        runtime.finish({"a"})
        begin(runtime, batch(("b", 12, 1, 8)))
        assert runtime.current.slots is not seen[4]

    def test_one_id_two_requests(self) -> None:
        runtime = make(answers=dict(ANSWERS))
        run(runtime, batch(("a", 0, 90, 90), ("b", 0, 90, 90)))
        runtime.finish({"a", "b"})
        for name in ("b", "a"):
            runtime.admit([Prompt(name, 90, [0])])
        runtime.begin_step(batch(("a", 0, 90, 90), ("b", 0, 90, 90)))
        expected = [runtime.table.slot("a"), runtime.table.slot("b")]
        assert runtime.current.slots.tolist() == expected


class TestKnownRoutes:
    """The host knows routes once they were read back, and until they are decided anew."""

    def known(self, runtime: Any, *rows: int) -> list | None:
        found = runtime.known_routes(np.array(rows, dtype=np.int64))
        return None if found is None else found[:, list(ROUTED)].tolist()

    def begin_late(self, runtime: Any, step: Any) -> Any:
        """Begin a step whose decisions come in once the event that is returned has passed."""
        event = SimpleNamespace(has_passed=False, synchronize=lambda: None)
        event.query = lambda: event.has_passed
        begin(runtime, step)
        if runtime._readback is not None:
            object.__setattr__(runtime._readback, "event", event)
        return event

    def test_from_when_they_have_come_in(self) -> None:
        """In the step itself, or in a later one."""
        runtime = make(answers=ANSWERS)
        event = self.begin_late(runtime, batch(("a", 0, 30, 90)))
        assert self.known(runtime, 0) is None
        event.has_passed = True
        assert self.known(runtime, 0) == [A]
        runtime.end_step()
        event = self.begin_late(runtime, batch(("c", 0, 9, 9), ("b", 0, 30, 90), ("a", 30, 30, 90)))
        assert self.known(runtime, 2) == [A]
        assert self.known(runtime, 1, 2) is None
        assert self.known(runtime) == []
        event.has_passed = True
        assert self.known(runtime, 1, 2) == [B, A]
        assert self.known(runtime, 2, 1) == [A, B]
        assert self.known(runtime, 0, 1) is None
        runtime.end_step()
        begin(runtime, batch(("b", 30, 30, 90), ("a", 60, 30, 90)))
        assert self.known(runtime, 0, 1) == [B, A]

    def test_a_slot_that_changed_hands_is_not_known(self) -> None:
        """Also where the former owner's routes come in late."""
        runtime = make(answers=ANSWERS, max_requests=1)
        begin(runtime, batch(("a", 0, 30, 90)))
        count, runtime._count_pending = runtime._count_pending, lambda wait: None
        runtime.end_step()
        runtime.finish({"a"})
        slot = runtime.table._slots.get("b")
        begin(runtime, batch(("b", 0, 30, 90)))
        runtime.end_step()
        runtime._count_pending = count
        begin(runtime, batch(("b", 30, 30, 90)))
        assert slot is None
        assert len(runtime._pending) == 2
        pending = runtime._pending.pop()
        runtime._count_pending(wait=True)
        assert self.known(runtime, 0) is None
        runtime._pending.append(pending)
        runtime._count_pending(wait=True)
        assert self.known(runtime, 0) == [B]

    def test_a_longer_prompt_is_not_known(self) -> None:
        runtime = make(answers=dict(ANSWERS))
        run(runtime, batch(("a", 0, 50, 50)))
        runtime.probe.answers["a"] = C
        event = self.begin_late(runtime, batch(("a", 50, 30, 80)))
        assert self.known(runtime, 0) == [A]  # not announced
        begin(runtime, batch(("a", 50, 30, 80)), announced="a")
        assert event.has_passed is False
        object.__setattr__(runtime._readback, "event", event)
        assert self.known(runtime, 0) is None
        event.has_passed = True
        assert self.known(runtime, 0) == [C]

    def test_fixed_routes_always(self) -> None:
        runtime = make("static", sparse_layers=(1,), sink_tokens=1, window_tokens=2)
        begin(runtime, batch(("a", 0, 50, 50)))
        assert self.known(runtime, 0) == [[FULL, SPARSE, FULL]]


class TestSlots:
    def test_finished_requests_leave_nothing(self) -> None:
        runtime = make(answers={f"r{i}": A for i in range(50)})
        for index in range(50):
            name = f"r{index}"
            run(runtime, batch((name, 0, 90, 90)))
            runtime.finish([name])
            assert runtime.status()["live_requests"] == 0
        assert len(runtime.table.settled_prompt_len) == 2

    @pytest.mark.parametrize("length", [10, 90], ids=["before-the-probe", "after-the-probe"])
    def test_abort_and_the_id_again(self, length: int) -> None:
        runtime = make(answers=dict(ANSWERS))
        run(runtime, batch(("a", 0, 10, length)))
        runtime.finish({"a"})
        assert runtime.status()["live_requests"] == 0
        assert not runtime.prompts_may_be_due()
        runtime.probe.answers["a"] = B  # type: ignore[union-attr]
        assert run(runtime, batch(("a", 0, 90, 90))) == ["a"]
        assert recorded(runtime)[-1] == (("a",), [B], [True])

    def test_more_requests_than_slots(self) -> None:
        """Preempted requests keep their slots, so more may live than run."""
        names = [f"c{index}" for index in range(7)]
        runtime = make(answers=ANSWERS | dict.fromkeys(names, C), max_requests=1)
        with torch.inference_mode():
            run(runtime, batch(("a", 0, 50, 50), ("b", 0, 50, 50)))
        slot = runtime.table.slot("a")
        runtime.finish(["a"])
        capacity = len(runtime.table.routes)
        names = names[: capacity - 1]
        run(runtime, batch(("b", 50, 1, 50), *((name, 0, 5, 5) for name in names)))
        assert slot in {runtime.table.slot(name) for name in names}
        assert recorded(runtime)[-1][1] == [B] + [NONE] * len(names)
        assert len(runtime.table.routes) == capacity

    def test_step_that_was_not_sampled_from_ends_before_the_next(self) -> None:
        runtime = make(answers=ANSWERS)
        begin(runtime, batch(("a", 0, 50, 50)))
        begin(runtime, batch(("a", 50, 1, 50)))
        runtime.end_step()
        assert [routes for _, routes, _ in recorded(runtime)] == [[A]] * 2

    def test_abandoned_step(self) -> None:
        runtime = make(answers=ANSWERS)
        begin(runtime, batch(("a", 0, 50, 50)))
        runtime.abandon_step()
        runtime.end_step()
        assert recorded(runtime) == []


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
        assert run(runtime, batch(("a", 0, 9, 9), ("b", 0, 3, 8))) == ["a", "b"]
        assert runtime.table.routes[runtime.table.slots(["a", "b"])].tolist() == [routes] * 2
        kept = [routes[layer] for layer in ROUTED]
        assert recorded(runtime) == [(("a", "b"), [kept, kept], [True, True])]
        assert run(runtime, batch(("b", 3, 5, 8)), announced="b") == []

    def test_new_pattern_is_for_all_requests(self) -> None:
        runtime = make("static", sparse_layers=(1,), sink_tokens=1, window_tokens=2)
        run(runtime, batch(("a", 0, 9, 9)))
        runtime.fix_routes((0, 3))
        run(runtime, batch(("a", 9, 1, 9), ("b", 0, 9, 9)))
        assert recorded(runtime)[-1][1] == [[SPARSE, FULL, SPARSE]] * 2

    def test_keys_given_back_fix_them(self) -> None:
        sizes = {"sink_tokens": 1, "window_tokens": 2}
        runtime = make("static", sparse_layers=(1,), free_kv=True, **sizes)
        with pytest.raises(UnsupportedConfigurationError) as error:
            runtime.fix_routes((0, 3))
        assert str(error.value) == (
            'flux_fix_routes: expected an engine without "free_kv", found one that has given back '
            'keys of the layers that were SPARSE; start it without "free_kv"'
        )
        assert runtime.fixed_routes == [FULL, SPARSE, OPEN, FULL]

    def test_router_has_none(self) -> None:
        runtime = make()
        assert runtime.fixed_routes is None
        with pytest.raises(AssertionError):
            runtime.fix_routes((0,))


class TestSetThreshold:
    def test_config_and_probe_follow(self) -> None:
        runtime = make(answers=ANSWERS)
        runtime.set_threshold(0.8)
        assert runtime.config.threshold == 0.8
        assert runtime.probe.thresholds == [0.8]  # type: ignore[union-attr]

    def test_value_out_of_range_changes_nothing(self) -> None:
        runtime = make(answers=ANSWERS)
        with pytest.raises(FluxConfigError, match="expected a number from 0 to 1"):
            runtime.set_threshold(1.5)
        assert runtime.probe.thresholds == []  # type: ignore[union-attr]

    def test_layers_whose_keys_are_given_back_stay_sparse(self) -> None:
        runtime = make(answers=ANSWERS, free_kv=True)
        runtime.set_threshold(0.01)
        with pytest.raises(FluxConfigError, match='a threshold above 0 with "free_kv"'):
            runtime.set_threshold(0)
        assert runtime.config.threshold == 0.01
        assert runtime.probe.thresholds == [0.01]  # type: ignore[union-attr]

    def test_fixed_routes_have_none(self) -> None:
        with pytest.raises(AssertionError, match="the policy is not `router`"):
            make("full").set_threshold(0.5)


class TestStatus:
    def test_recent_decisions(self) -> None:
        runtime = make(answers=ANSWERS)
        run(runtime, batch(("a", 0, 64, 100)))
        run(runtime, batch(("a", 64, 36, 100), ("b", 0, 40, 40), ("c", 0, 7, 7)))
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
            run(runtime, batch((name, 0, 9, 9)))
            runtime.finish([name])
        names = [entry["request_id"] for entry in runtime.status()["recent"]]
        assert names == [f"r{i}" for i in range(300 - len(names), 300)]
        assert len(names) == 256

    def test_warmup_is_not_recent(self) -> None:
        runtime = make("full")
        run(runtime, batch(("_warmup_0", 0, 9, 9), is_warmup=True))
        assert runtime.status()["recent"] == []

    def test_a_rank_that_nobody_reads_copies_nothing(self, monkeypatch) -> None:
        """All tensor-parallel ranks have the same routes: the first one's are read."""
        runtime = make(answers=ANSWERS)
        runtime.reads_back = False
        monkeypatch.setattr(PendingReadback, "read", None)
        assert run(runtime, batch(("a", 0, 50, 50))) == ["a"]
        assert run(runtime, batch(("a", 50, 1, 50))) == []
        assert runtime.table.routes[runtime.table.slot("a")].tolist() == [
            SPARSE,
            FULL,
            OPEN,
            SPARSE,
        ]
        assert runtime.status()["recent"] == recorded(runtime) == []

    def test_offline(self) -> None:
        runtime = make("full")
        run(runtime, batch(("a", 0, 9, 9)))

        class LLM:
            def collective_rpc(self, name: str) -> list[Any]:
                assert name == "flux_status"
                return [runtime.status()]

        (decision,) = recent_decisions(LLM())
        assert decision == runtime.recent[0]
