"""The parts of `bench_served_day` that need no server: rows."""

from typing import Any

import pytest

from benchmarks.bench_served_day import KINDS, day_row, describe


def result(**values: Any) -> dict[str, Any]:
    defaults = {
        "completed": 9,
        "failed": 0,
        "duration": 10.0,
        "total_input_tokens": 900,
        "total_output_tokens": 100,
        "median_ttft_ms": 20.0,
        "p99_ttft_ms": 80.0,
        "median_tpot_ms": 4.0,
        "p99_tpot_ms": 6.0,
    }
    return defaults | values


def test_kinds_are_all_requests() -> None:
    assert sum(share for share, _ in KINDS.values()) == pytest.approx(1)


def test_throughput_is_of_both_kinds() -> None:
    """Over the time of the longer client."""
    found = {"chat": result(), "document": result(duration=20.0, total_input_tokens=9900)}
    row = day_row("qwen", "static", 8.0, found)
    assert row["tokens_per_second"] == (1000 + 10_000) / 20
    assert (row["what"], row["policy"], row["rate"]) == ("served_day", "static", 8.0)
    assert row["document_p99_ttft_ms"] == 80.0
    assert describe(row) == (
        "served day, static           rate   8.0:      550 tokens/s, chat TTFT 20 (p99 80) ms "
        "TPOT 4.00 (p99 6.00) ms, document TTFT 20 (p99 80) ms TPOT 4.00 (p99 6.00) ms"
    )


@pytest.mark.parametrize("values", [{"failed": 1}, {"completed": 0}])
def test_failed_requests_are_no_row(values: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="expected every request to be answered"):
        day_row("qwen", "static", 8.0, {"chat": result(), "document": result(**values)})
