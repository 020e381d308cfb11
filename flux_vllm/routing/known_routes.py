"""What the host knows of the routes in the table, which come in some steps after they are decided.

Dimension legend: S request slots, R rows of a batch, K some of them, L layers of the model.
"""

from collections.abc import Sequence

import numpy as np

from flux_vllm.router.route import Route
from flux_vllm.routing.readback import PendingReadback, RoutedBatch
from flux_vllm.routing.route_table import RouteTable


class KnownRoutes:
    """Routes by slot, as the batches had them that were taken in.

    Args:
        table: whose routes they are.
        columns: layers of the model that are routed.
    """

    def __init__(self, table: RouteTable, columns: Sequence[int]) -> None:
        self._table = table
        self._columns = np.array(columns, dtype=np.int64)
        self._routes = np.empty((0, table.num_layers), dtype=np.int8)
        # Slots whose routes here are those that stand.
        self._current: set[int] = set()
        self._latest_slots = np.empty(0, dtype=np.int64)
        self._latest_rows = np.empty((0, len(columns)), dtype=np.int8)

    def fix(self, routes: Sequence[int]) -> None:
        """Take it that all slots have these routes [L]."""
        self._routes[:] = routes
        self._latest_slots = np.empty(0, dtype=np.int64)

    def forget(self, slot: int) -> None:
        """Take note that a slot has a new owner, or its owner new routes."""
        self._current.discard(slot)

    def take(self, pending: PendingReadback) -> np.ndarray:
        """Take in what was decided for a batch that ran; batches come in the order of their run.

        Args:
            pending: of the batch, arrived.

        Returns: [R, routed layers] int8, as the batch's rows attended; the same array where all
            rows are as they were in the batch before.
        """
        rows, touched = pending.rows, pending.rows.touched
        missing = len(self._table.settled_prompt_len) - len(self._routes)
        if missing > 0:
            undecided = int(Route.UNDECIDED)
            self._routes = np.pad(self._routes, ((0, missing), (0, 0)), constant_values=undecided)
        # Only rows whose routes were decided in the batch can differ from what is known of their
        # slot, once a new request has forgotten the slot's former owner.
        if touched is not None:
            self._routes[rows.slots[touched.is_new]] = int(Route.UNDECIDED)
            if pending.routes is not None:
                self._routes[rows.slots[touched.decided]] = pending.routes.numpy()
                self._note_owners(rows, touched.decided)
        if touched is not None or rows.slots is not self._latest_slots:
            self._latest_slots = rows.slots
            self._latest_rows = self._routes[rows.slots][:, self._columns]
        return self._latest_rows

    def _note_owners(self, rows: RoutedBatch, decided: np.ndarray) -> None:
        """Note whose routes stand: not of requests that ended since or were decided anew."""
        for row in np.flatnonzero(decided):
            slot, length = int(rows.slots[row]), rows.batch.prompt_lens[row]
            is_owner = self._table.slot(rows.batch.request_ids[row]) == slot
            if is_owner and self._table.settled_prompt_len[slot] == length:
                self._current.add(slot)

    def of_slot(self, slot: int) -> np.ndarray:
        """Return a slot's routes [L] int8, as the batch taken in last had them."""
        routes: np.ndarray = self._routes[slot]
        return routes

    def of_rows(
        self, current: RoutedBatch, readback: PendingReadback | None, rows: np.ndarray
    ) -> np.ndarray | None:
        """Return the routes that stand of rows of the current batch, if they are all here.

        Args:
            current: the batch.
            readback: of what was decided for it, if anything was.
            rows: [K] int64: their places in the batch.

        Returns: [K, L] int8.
        """
        slots = current.slots[rows]
        is_here = np.fromiter(map(self._current.__contains__, slots.tolist()), bool, len(slots))
        if is_here.all():
            return self._routes[slots]
        if readback is None or current.touched is None or not readback.is_ready():
            return None
        if not current.touched.decided[rows[~is_here]].all():
            return None
        routes = np.empty((len(rows), self._table.num_layers), dtype=np.int8)
        routes[is_here] = self._routes[slots[is_here]]
        routes[~is_here] = readback.routes_of(rows[~is_here])
        return routes
