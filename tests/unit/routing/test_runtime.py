"""FluxRuntime: when routes are decided, and that they stand.

Oracle: routes written down by hand for each request; a recording reporter in place of the metrics.
Pinned: a request keeps its routes through preemption and recomputation; a slot that a new request
takes over says nothing of its former owner, in the table or in the numbers.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.routing.prompts import Prompt
from tests.unit.routing.worker import (
    ANSWERS,
    FULL,
    INFO,
    NONE,
    OPEN,
    REACH,
    ROUTED,
    SPARSE,
    A,
    B,
    C,
    asked,
    batch,
    begin,
    make,
    recorded,
    run,
)


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
        begin(runtime, batch(("b", 0, 30, 90)))
        runtime.end_step()
        runtime._count_pending = count
        begin(runtime, batch(("b", 30, 30, 90)))
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
