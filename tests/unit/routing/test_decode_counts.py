"""DecodeCounts: what kernels added up comes to the host once, and never by waiting.

Oracle: totals written down by hand, as a kernel grows them.
"""

import pytest
import torch

from flux_vllm.routing import decode_counts
from flux_vllm.routing.decode_counts import READ_SECONDS, DecodeCounts, DecodeKeys


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(decode_counts.time, "monotonic", lambda: now[0])
    return now


def grow(counts: DecodeCounts, attended: int, context: int, unrouted: int = 0) -> None:
    """Add what two rows read."""
    counts.totals += torch.tensor([[attended, 1], [context, 1], [unrouted, 0]])


def test_it_is_read_after_a_while(clock: list[float]) -> None:
    counts = DecodeCounts(2, torch.device("cpu"))
    grow(counts, 10, 30)
    assert counts.poll() is None
    clock[0] += READ_SECONDS
    assert counts.poll() is None  # asked for, taken in the next step
    grow(counts, 5, 5)
    assert counts.poll() == DecodeKeys(11, 31, 0)
    assert counts.poll() is None
    clock[0] += READ_SECONDS
    assert counts.poll() is None
    assert counts.poll() == DecodeKeys(6, 6, 0)


def test_nothing_counts_twice(clock: list[float]) -> None:
    counts = DecodeCounts(2, torch.device("cpu"))
    grow(counts, 10, 30, unrouted=2)
    clock[0] += READ_SECONDS
    counts.poll()
    grow(counts, 1, 2)
    assert counts.read() == DecodeKeys(13, 34, 2)
    assert counts.poll() is None
    assert counts.read() == DecodeKeys(0, 0, 0)


def test_what_is_on_its_way_is_not_waited_for(clock: list[float]) -> None:
    class Event:
        has_passed = False

        def query(self) -> bool:
            return self.has_passed

    counts = DecodeCounts(2, torch.device("cpu"))
    grow(counts, 10, 30)
    clock[0] += READ_SECONDS
    counts.poll()
    counts._event = Event()  # type: ignore[assignment]
    assert counts.poll() is None
    counts._event.has_passed = True
    assert counts.poll() == DecodeKeys(11, 31, 0)
