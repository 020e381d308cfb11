"""What the host knows of routes that come in some steps after they were decided.

Oracle: whose routes stand, written out for each case.
"""

import numpy as np
import torch

from flux_vllm.batch import Batch
from flux_vllm.router.route import Route
from flux_vllm.routing.known_routes import KnownRoutes
from flux_vllm.routing.readback import PendingReadback, RoutedBatch, TouchedRows
from flux_vllm.routing.route_table import RouteTable

FULL, SPARSE = int(Route.FULL), int(Route.SPARSE)
ROW = np.array([0])


class Host:
    """A table of one request, and what is known of it."""

    def __init__(self) -> None:
        self.table = RouteTable(2, 1, torch.device("cpu"))
        self.known = KnownRoutes(self.table, [0, 1])
        self.slot, _ = self.table.acquire("a")

    def decide(self, prompt_len: int, routes: list[int]) -> PendingReadback:
        """Decide for a prompt of the request; what comes back is on its way."""
        self.table.settle(self.slot, prompt_len, 0)
        self.known.forget(self.slot)
        self.table.routes[self.slot] = torch.tensor(routes, dtype=torch.int8)
        return PendingReadback.read(self.batch(prompt_len, decided=True), self.table, None)

    def batch(self, prompt_len: int, decided: bool = False) -> RoutedBatch:
        one = np.array([prompt_len])
        batch = Batch(("a",), one, np.zeros(1, np.int64), one, np.array([True]))
        yes, no = np.array([True]), np.array([False])
        touched = TouchedRows(no, yes, yes) if decided else None
        return RoutedBatch(batch, np.array([self.slot]), touched)

    def found(self, prompt_len: int) -> list[int] | None:
        """Give the routes that the next batch may plan by."""
        routes = self.known.of_rows(self.batch(prompt_len), None, ROW)
        return None if routes is None else routes[0].tolist()


def test_routes_are_known_once_they_came() -> None:
    host = Host()
    pending = host.decide(10, [FULL, SPARSE])
    assert host.found(10) is None
    host.known.take(pending)
    assert host.found(10) == [FULL, SPARSE]


def test_routes_of_a_shorter_prompt_that_come_late_do_not_stand() -> None:
    """A session took more input meanwhile: its new routes are still on their way."""
    host = Host()
    late = host.decide(10, [FULL, SPARSE])
    new = host.decide(20, [SPARSE, FULL])
    host.known.take(late)
    assert host.found(20) is None
    host.known.take(new)
    assert host.found(20) == [SPARSE, FULL]


def test_a_new_owner_has_none_of_the_former_ones() -> None:
    host = Host()
    host.known.take(host.decide(10, [FULL, SPARSE]))
    host.known.forget(host.slot)
    assert host.found(5) is None


def test_routes_of_a_request_that_ended_do_not_stand() -> None:
    host = Host()
    late = host.decide(10, [FULL, SPARSE])
    host.table.release(["a"])
    host.known.take(late)
    assert host.found(10) is None
