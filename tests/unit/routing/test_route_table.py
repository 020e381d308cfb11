"""The route table: slots taken and given back, defaults, growth.

Oracle: contents written down by hand. Pinned: a slot that a new request takes over says nothing of
its former owner.
"""

import numpy as np
import torch

from flux_vllm.router.route import Route
from flux_vllm.routing.route_table import RouteTable

CPU = torch.device("cpu")
OPEN = int(Route.UNDECIDED)
ROUTES = torch.tensor([1, 0, -1], dtype=torch.int8)
P_FULL = torch.tensor([0.9, 0.2, float("nan")])


def test_slot_stays_until_release() -> None:
    table = RouteTable(3, 2, CPU)
    slot, is_new = table.acquire("a")
    assert is_new
    table.write(slot, ROUTES, P_FULL)
    assert table.acquire("a") == (slot, False)
    other, _ = table.acquire("b")
    assert table.slots(["b", "a"]).tolist() == [other, slot]
    routes, probability = table.of_slots(np.array([slot]))
    assert torch.equal(routes[0], ROUTES)
    torch.testing.assert_close(probability[0], P_FULL, equal_nan=True)
    assert len(table) == 2
    table.release(["a", "unknown"])
    assert len(table) == 1


def test_new_owner_finds_defaults() -> None:
    table = RouteTable(3, 1, CPU)
    slot, _ = table.acquire("a")
    table.write(slot, ROUTES, P_FULL)
    table.settled_prompt_len[slot] = 9
    table.release(["a"])
    assert table.acquire("b") == (slot, True)
    assert (table.routes[slot] == OPEN).all()
    assert table.full_probability[slot].isnan().all()
    assert table.settled_prompt_len[slot] == 0


def test_growth_keeps_what_is_there() -> None:
    table = RouteTable(3, 1, CPU)
    slot, _ = table.acquire("a")
    table.write(slot, ROUTES, float("nan"))
    more = [table.acquire(name)[0] for name in "bcd"]
    assert len({slot, *more}) == 4
    assert torch.equal(table.routes[slot], ROUTES)
    assert (table.routes[more] == OPEN).all()


def test_where_sparse_decode_begins() -> None:
    table = RouteTable(3, 1, CPU)
    slot, _ = table.acquire("a")
    version = table.version
    table.settle(slot, 100, 0)
    assert (table.settled_prompt_len[slot], int(table.sparse_from[slot])) == (100, 0)
    assert table.version == version  # nothing that the device knows has changed
    table.settle(slot, 120, 8)
    assert (table.settled_prompt_len[slot], int(table.sparse_from[slot])) == (120, 128)
    assert table.version > version
    table.acquire("b")  # the table grows
    assert int(table.sparse_from[slot]) == 128


def test_fixed_routes_are_for_live_and_later_requests() -> None:
    table = RouteTable(3, 1, CPU)
    first, _ = table.acquire("a")
    table.fix([1, 0, 1])
    second, _ = table.acquire("b")
    assert table.routes[[first, second]].tolist() == [[1, 0, 1]] * 2
