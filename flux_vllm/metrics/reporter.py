"""From a step's routes to the metrics: decisions, saved KV reading, rows without a route.

Dimension legend: R requests, L routed layers of the model.
"""

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flux_vllm.batch import Batch
from flux_vllm.metrics.store import MetricStore
from flux_vllm.patterns.keys import full_keys, sparse_decode_keys
from flux_vllm.router.route import Route

if TYPE_CHECKING:
    from flux_vllm.patterns.base import SparsePattern
    from flux_vllm.routing.decode_counts import DecodeKeys

RATIO_BUCKETS = tuple(round(0.1 * tenth, 1) for tenth in range(11))

_DECISIONS = "Routes decided, one a request and routed layer."
_RATIO = "Share of a request's routed layers that are SPARSE."
_ATTENDED = "Keys attended to, summed over queries and routed layers."
_CONTEXT = "Keys full attention would have attended to, summed likewise."
_UNROUTED = "Rows longer than sinks and window without a route; anything but 0 is a defect."
_NONFINITE = "Requests whose router logits were not finite, FULL there; anything but 0 is a defect."
_UNREAD = "Requests whose prompt no router could read (embeddings, images): FULL where that may be."
_INFO = "The router in use and its configuration; always 1."


FLUSH_SECONDS = 0.2
"""How long what a step read may go uncounted while others follow it."""


class _RowRoutes(NamedTuple):
    """What counts of a step's routes."""

    routes: np.ndarray
    """[R, L] int8."""
    num_sparse: np.ndarray
    """[R] SPARSE layers."""
    is_open: np.ndarray
    """[R] bool: any layer is UNDECIDED."""

    @classmethod
    def of(cls, routes: np.ndarray) -> "_RowRoutes":
        return cls(
            routes,
            (routes == Route.SPARSE).sum(axis=1),
            (routes == Route.UNDECIDED).any(axis=1),
        )


class RouteReporter:
    """Counts what one worker's steps did.

    Args:
        store: where the counters live.
        layers: indices of the model's routed layers.
        block_size: tokens a KV block.
        pattern: of SPARSE layers.
        counts_requests: False where another worker counts the same requests, and their steps but
            for what this worker's own kernels count.
        full_decode_tokens: of an answer, for which SPARSE layers attend to everything.
        sparse_prefill: whether layers compute prompts as SPARSE whatever their routes.
    """

    def __init__(
        self,
        store: MetricStore,
        layers: tuple[int, ...],
        block_size: int,
        pattern: "SparsePattern",
        counts_requests: bool = True,
        full_decode_tokens: int = 0,
        sparse_prefill: bool = False,
    ) -> None:
        self._store = store
        self._layers = layers
        self._block_size = block_size
        self._pattern = pattern
        self._counts_requests = counts_requests
        self._full_decode_tokens = full_decode_tokens
        self._sparse_prefill = sparse_prefill
        self._pending: list[tuple[Batch, _RowRoutes]] = []
        self._decided: list[np.ndarray] = []
        self._flushed = time.monotonic()
        for route in (Route.FULL, Route.SPARSE):
            for layer in layers:
                self._count_decisions(layer, route, 0)
        for phase in ("prefill", "decode"):
            self._count_tokens(phase, 0, 0)
        store.add("flux_unrouted_rows", 0, _UNROUTED)
        store.add("flux_nonfinite_router_rows", 0, _NONFINITE)
        store.add("flux_unread_prompts", 0, _UNREAD)

    def announce(self, **labels: str) -> None:
        """Publish `flux_router_info`."""
        self._store.set("flux_router_info", 1, _INFO, **labels)

    def record(
        self,
        batch: Batch,
        routes: np.ndarray,
        decided: np.ndarray | None,
        counts_keys: bool = True,
    ) -> None:
        """Note one step, to be counted with the next ones: within a fifth of a second of them.

        Args:
            batch: of the step that ran.
            routes: [R, L] int8, as the rows attended; the same array says the same.
            decided: [R] bool: the row's routes were decided for this step; None for no row.
            counts_keys: False where kernels counted the rows' keys, see `record_decode`.
        """
        if batch.is_warmup or not len(batch) or not self._counts_requests:
            return
        if counts_keys:
            if self._pending and self._pending[-1][1].routes is routes:
                self._pending.append((batch, self._pending[-1][1]))
            else:
                self._pending.append((batch, _RowRoutes.of(routes)))
        if decided is not None:
            self._decided.append(routes[decided])
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def record_decode(self, keys: "DecodeKeys") -> None:
        """Count what kernels counted of decode steps."""
        if keys.unrouted_rows:
            self._store.add("flux_unrouted_rows", keys.unrouted_rows, _UNROUTED)
        self._count_tokens("decode", keys.attended, keys.context)

    def flush(self) -> None:
        """Count the steps that wait, all rows at once: a step by itself costs as much as many."""
        self._flushed = time.monotonic()
        if self._decided:
            self._count_requests(np.concatenate(self._decided))
            self._decided.clear()
        if not self._pending:
            return
        batch = Batch.concatenate([batch for batch, _ in self._pending])
        num_sparse = np.concatenate([routes.num_sparse for _, routes in self._pending])
        is_open = np.concatenate([routes.is_open for _, routes in self._pending])
        self._pending.clear()
        reach = self._pattern.sink_tokens + self._pattern.window_tokens
        is_long = batch.computed + batch.scheduled > reach
        unrouted = (is_long & is_open).sum()
        if unrouted:
            self._store.add("flux_unrouted_rows", int(unrouted), _UNROUTED)
        if self._sparse_prefill:
            num_sparse = np.where(batch.is_prefill & ~is_open, len(self._layers), num_sparse)
        self._count_keys(batch, num_sparse)

    def _count_requests(self, routes: np.ndarray) -> None:
        """Count the routes that requests got: [P, L] int8."""
        for route in Route:
            for layer, amount in zip(self._layers, (routes == route).sum(axis=0), strict=True):
                if amount:
                    self._count_decisions(layer, route, int(amount))
        for ratio in (routes == Route.SPARSE).mean(axis=1):
            self._store.observe("flux_request_sparse_layers_ratio", ratio, RATIO_BUCKETS, _RATIO)

    def _count_keys(self, batch: Batch, sparse_layers: np.ndarray) -> None:
        """Count the keys of all rows, given their numbers of SPARSE layers [R]."""
        full = full_keys(batch.computed, batch.scheduled)
        prefill = self._pattern.prefill_keys(batch)
        decode = sparse_decode_keys(
            batch.computed,
            batch.scheduled,
            self._block_size,
            self._pattern.sink_tokens,
            self._pattern.window_tokens,
        )
        counted_layers = np.full(len(batch), len(self._layers))
        if prefill is None:
            # What such a layer attended to is known on the device alone: leave it out of both sums.
            counted_layers[batch.is_prefill] -= sparse_layers[batch.is_prefill]
            prefill = np.zeros_like(full)
        is_early = batch.computed + batch.scheduled <= batch.prompt_lens + self._full_decode_tokens
        sparse = np.where(batch.is_prefill, prefill, np.where(is_early, full, decode))
        attended = sparse * sparse_layers + full * (len(self._layers) - sparse_layers)
        context = full * counted_layers
        for phase, rows in (("prefill", batch.is_prefill), ("decode", ~batch.is_prefill)):
            self._count_tokens(phase, int(attended[rows].sum()), int(context[rows].sum()))

    def record_probes(self, full_probability: np.ndarray, unread: int) -> None:
        """Count what routers could not decide.

        Args:
            full_probability: [P, L] float32, of the requests that were probed for a step; NaN
                where the logits were not finite.
            unread: requests whose routes mattered in the step, and whose prompt is no token ids.
        """
        if not self._counts_requests:
            return
        rows = int(np.isnan(full_probability).any(axis=1).sum())
        if rows:
            self._store.add("flux_nonfinite_router_rows", rows, _NONFINITE)
        if unread:
            self._store.add("flux_unread_prompts", unread, _UNREAD)

    def _count_decisions(self, layer: int, route: Route, amount: int) -> None:
        self._store.add(
            "flux_route_decisions",
            amount,
            _DECISIONS,
            layer=str(layer),
            route=route.name.lower(),
        )

    def _count_tokens(self, phase: str, attended: int, context: int) -> None:
        self._store.add("flux_attended_tokens", attended, _ATTENDED, phase=phase)
        self._store.add("flux_context_tokens", context, _CONTEXT, phase=phase)
