"""What FluxRuntime reports: decisions, counts that the device makes, the latest requests.

Oracle: routes written down by hand for each request; a recording reporter in place of the metrics.
"""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.routing.decode_counts import DecodeCounts, DecodeKeys
from flux_vllm.routing.readback import PendingReadback
from flux_vllm.routing.runtime import recent_decisions
from tests.unit.routing.worker import (
    ANSWERS,
    CPU,
    FULL,
    NONE,
    OPEN,
    REACH,
    ROUTED,
    SPARSE,
    A,
    B,
    batch,
    begin,
    make,
    recorded,
    run,
)


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
        run(runtime, batch(("a", 90, 1, 90)))
        runtime.decode_counts.totals[:, 1] = torch.tensor([1, 2, 0])
        runtime.end_step()  # vLLM's empty step
        found = runtime.reporter.decode_keys  # type: ignore[union-attr]
        assert found == [DecodeKeys(7, 9, 1), DecodeKeys(1, 2, 0)]

    def test_the_device_is_not_asked_where_nothing_was_decoded(self) -> None:
        runtime = self.make()
        found = runtime.reporter.decode_keys  # type: ignore[union-attr]
        run(runtime, batch(("a", 0, 90, 90)))
        runtime.end_step()  # vLLM's empty step
        assert found == []
        run(runtime, batch(("b", 0, 90, 90)))
        run(runtime, batch(("b", 90, 1, 90)))
        runtime.end_step()
        runtime.end_step()
        assert found == [DecodeKeys(0, 0, 0)]

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

    def test_a_request_named_like_vllms_warm_up_is_counted_with_its_neighbours(self) -> None:
        runtime = make("full")
        run(runtime, batch(("_warmup_0", 0, 9, 9), ("a", 0, 9, 9)))
        names = [entry["request_id"] for entry in runtime.status()["recent"]]
        assert names == ["_warmup_0", "a"]

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
