"""A batch's rows with their slots in the route table, and what was decided on its way to the host.

Dimension legend: R rows of the batch, P rows whose routes were decided for it, L layers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from flux_vllm.batch import Batch
from flux_vllm.routing.route_table import RouteTable


class TouchedRows(NamedTuple):
    """The rows of a batch in which any request came new or got its routes."""

    is_new: np.ndarray
    """[R] bool: requests that got their slot for this batch."""
    decided: np.ndarray
    """[R] bool: requests whose routes were decided for this batch, P of them."""
    probed: np.ndarray
    """[R] bool: those among them whose routes a router chose."""


@dataclass(frozen=True, slots=True)
class RoutedBatch:
    """A Batch with the route table's view of its rows."""

    batch: Batch
    slots: np.ndarray
    """[R] int64."""
    touched: TouchedRows | None = None
    """None, by far most often, where all rows are as they were."""


@dataclass(frozen=True, slots=True)
class PendingReadback:
    """A batch, with the routes decided for it on their way to the host."""

    rows: RoutedBatch
    routes: torch.Tensor | None
    """[P, L] int8 on the host, valid once the event has passed; None where P is 0."""
    full_probability: torch.Tensor | None
    """[P, L] float32 on the host, likewise."""
    event: torch.cuda.Event | None
    """None where the values are there at once."""

    @classmethod
    def read(
        cls, rows: RoutedBatch, table: RouteTable, fixed_routes: list[int] | None
    ) -> "PendingReadback":
        """Start copying what was decided, unless it is known; returns at once."""
        event = routes = probability = None
        touched = rows.touched
        decided = 0 if touched is None else int(touched.decided.sum())
        if decided and fixed_routes is not None:
            routes = torch.tensor(fixed_routes, dtype=torch.int8).expand(decided, -1)
            probability = torch.full((decided, table.num_layers), float("nan"))
        elif decided:
            assert touched is not None
            routes, probability = table.of_slots(rows.slots[touched.decided])
            if table.device.type != "cpu":
                routes, probability = _to_host(routes), _to_host(probability)
                event = torch.cuda.Event()
                event.record()
            else:
                routes, probability = routes.clone(), probability.clone()
        return cls(rows, routes, probability, event)

    def routes_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the routes of rows that were decided, once they have arrived.

        Args:
            rows: [K] int64: their places in the batch.

        Returns: [K, L] int8.
        """
        assert self.rows.touched is not None
        assert self.routes is not None
        place = np.cumsum(self.rows.touched.decided) - 1
        routes: np.ndarray = self.routes.numpy()[place[rows]]
        return routes

    def by_request(self) -> dict[str, np.ndarray]:
        """Return what was decided, [L] int8 by request; waits until it has arrived."""
        touched = self.rows.touched
        if self.routes is None or touched is None:
            return {}
        self.wait()
        names = [self.rows.batch.request_ids[row] for row in np.flatnonzero(touched.decided)]
        return dict(zip(names, self.routes.numpy().copy(), strict=True))

    def is_ready(self) -> bool:
        """Say whether the values have arrived."""
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Wait until the values have arrived."""
        if self.event is not None:
            self.event.synchronize()


def _to_host(values: torch.Tensor) -> torch.Tensor:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
