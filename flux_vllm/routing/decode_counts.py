"""What decode rows read, added up on the device and brought to the host now and then.

Dimension legend: C capacity in rows.
"""

import time
from typing import NamedTuple

import torch

READ_SECONDS = 0.2
"""How long what decode steps read may go uncounted while others follow them."""


class DecodeKeys(NamedTuple):
    """What decode rows did since the last reading, summed over rows and routed layers."""

    attended: int
    """Keys."""
    context: int
    """Keys that full attention would have attended to."""
    unrouted_rows: int
    """Rows longer than sinks and window without a route."""


class DecodeCounts:
    """Totals that kernels grow in every decode step, so that the host counts none of them.

    Args:
        capacity: C, most rows of a batch, padding included.
        device: of the kernels.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        fields = len(DecodeKeys._fields)
        self.totals = torch.zeros(fields, capacity, dtype=torch.int64, device=device)
        """[3, C]: of each `DecodeKeys` field, what the rows in a place have read so far."""
        self._host = torch.zeros(fields, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._event: torch.cuda.Event | None = None
        self._is_reading = False
        self._read_at = time.monotonic()
        self._taken = DecodeKeys(0, 0, 0)

    def poll(self) -> DecodeKeys | None:
        """Return what has come in, and ask for more after a while; never waits."""
        if self._is_reading:
            if self._event is not None and not self._event.query():
                return None
            return self._take()
        if time.monotonic() - self._read_at >= READ_SECONDS:
            self._begin()
        return None

    def read(self) -> DecodeKeys:
        """Return all that was read until now; waits for the steps in flight."""
        self._begin()
        if self._event is not None:
            self._event.synchronize()
        return self._take()

    # The totals are written by vLLM's steps, which make tensors in inference mode.
    @torch.inference_mode()
    def _begin(self) -> None:
        self._is_reading = True
        self._read_at = time.monotonic()
        self._host.copy_(self.totals.sum(dim=1), non_blocking=True)
        if self.totals.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def _take(self) -> DecodeKeys:
        self._is_reading = False
        before, self._taken = self._taken, DecodeKeys(*self._host.tolist())
        return DecodeKeys(*(now - then for now, then in zip(self._taken, before, strict=True)))
