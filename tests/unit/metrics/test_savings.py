"""The share of KV reading saved.

Oracle: sums kept by hand, written by MetricStore as workers do.
"""

from pathlib import Path

import pytest

from flux_vllm.metrics.savings import read_key_reading
from flux_vllm.metrics.store import MetricStore


def test_nothing_read_yet(tmp_path: Path) -> None:
    reading = read_key_reading(tmp_path)
    assert set(reading) == {"prefill", "decode"}
    assert all(phase.saved is None for phase in reading.values())


def test_workers_are_summed_by_phase(tmp_path: Path) -> None:
    for scale in (1, 10):
        store = MetricStore(tmp_path, {"model_name": 'with "flux_attended_tokens_total" in it'})
        store.add("flux_route_decisions", 99, "D.", layer="0", route="full")
        for phase, attended, context in (("prefill", 3, 4), ("decode", 1, 5)):
            store.add("flux_attended_tokens", scale * attended, "A.", phase=phase)
            store.add("flux_context_tokens", scale * context, "C.", phase=phase)
    reading = read_key_reading(tmp_path)
    assert reading["prefill"].attended_tokens == 33
    assert reading["prefill"].context_tokens == 44
    assert reading["prefill"].saved == pytest.approx(0.25)
    assert reading["decode"].saved == pytest.approx(0.8)
