"""FluxRuntime: everything one worker knows of its routers, requests and current step."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from flux_vllm.batch import Batch
from flux_vllm.config import FluxConfig
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.metrics.journal import RouteJournal
from flux_vllm.metrics.reporter import RouteReporter
from flux_vllm.patterns.base import make_pattern
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route, choose_route, full_probability
from flux_vllm.router.state import RouteTable

_RECENT_DECISIONS = 256


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """The routes one request got. It holds no text."""

    request_id: str
    prompt_tokens: int
    routes: list[int]
    """One `Route` value a layer of the model; UNDECIDED (-1) for layers that are not routed."""
    full_probability: list[float]
    """P(FULL) a layer; NaN where no router decided."""


@dataclass(slots=True)
class RoutedBatch:
    """A Batch with the route table's view of its rows."""

    batch: Batch
    slots: np.ndarray
    """[R] int64."""
    is_new: np.ndarray
    """[R] bool: requests that got their slot in this step."""
    to_route: np.ndarray
    """[R] bool: prefill rows whose routes are still open."""


@dataclass(frozen=True, slots=True)
class PendingReadback:
    """A step that was launched, with the routes that it decided on their way to the host."""

    batch: Batch
    slots: np.ndarray
    """[R] int64."""
    is_new: np.ndarray
    """[R] bool: requests that got their slot in the step."""
    routed: np.ndarray
    """[R] bool: rows whose routes the step decided, P of them."""
    settled: np.ndarray
    """[R] bool: rows whose routes stand from now on."""
    routes: torch.Tensor | None
    """[P, layers of the model] int8 on the host, valid once the event has passed; None where the
    step decided nothing."""
    full_probability: torch.Tensor | None
    """[P, layers of the model] float32 on the host, likewise."""
    event: torch.cuda.Event | None
    """None where the values are there at once."""

    @classmethod
    def read(
        cls,
        current: RoutedBatch,
        settled: np.ndarray,
        table: RouteTable,
        fixed_routes: list[int] | None,
    ) -> "PendingReadback":
        """Start copying what a step decided, unless it is known; returns at once."""
        event = routes = probability = None
        rows = int(current.to_route.sum())
        if rows and fixed_routes is not None:
            routes = torch.tensor(fixed_routes, dtype=torch.int8).expand(rows, -1)
            probability = torch.full((rows, table.num_layers), float("nan"))
        elif rows:
            routes, probability = table.of_slots(current.slots[current.to_route])
            if table.device.type != "cpu":
                routes, probability = _to_host(routes), _to_host(probability)
                event = torch.cuda.Event()
                event.record()
            else:
                routes, probability = routes.clone(), probability.clone()
        return cls(
            batch=current.batch,
            slots=current.slots,
            is_new=current.is_new,
            routed=current.to_route,
            settled=settled,
            routes=routes,
            full_probability=probability,
            event=event,
        )

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


class FluxRuntime:
    """Routes requests in one worker.

    Args:
        config: the operator's.
        router: all layers' routers on the worker's device; None for policies that need none.
        info: the router file's; None likewise.
        num_layers: layers of the model.
        routed_layers: those with a route; the others keep the model's own sliding window.
        max_requests: slots to begin with.
        device: of the model.
        reduce_mean: mean of a tensor over tensor-parallel ranks.
    """

    def __init__(
        self,
        config: FluxConfig,
        router: LayerRouter | None,
        info: RouterInfo | None,
        num_layers: int,
        routed_layers: tuple[int, ...],
        max_requests: int,
        device: torch.device,
        reduce_mean: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.config = config
        self.router = router
        self.info = info
        self.routed_layers = routed_layers
        self._columns = np.array(routed_layers, dtype=np.int64)
        self.sink_tokens, self.window_tokens = config.window(info)
        self.pattern = make_pattern(
            config.pattern_name(info),
            self.sink_tokens,
            self.window_tokens,
            config.pattern_options,
        )
        self.table = RouteTable(num_layers, max_requests, device)
        self.current: RoutedBatch | None = None
        self.reporter: RouteReporter | None = None
        self.journal: RouteJournal | None = None
        self.recent: deque[RouteDecision] = deque(maxlen=_RECENT_DECISIONS)
        self._pending: deque[PendingReadback] = deque()
        self._deferred: list[Callable[[], None]] = []
        self._known_routes = np.empty((0, num_layers), dtype=np.int8)
        self.reduce_mean = reduce_mean
        self.fixed_routes: list[int] | None = None
        """By layer of the model, for policies that need no router."""
        if not config.needs_router:
            sparse = {"sparse": routed_layers, "static": config.sparse_layers}.get(config.policy)
            self.fix_routes(sparse or ())

    @torch.inference_mode()
    def fix_routes(self, sparse_layers: Iterable[int]) -> None:
        """Make these layers SPARSE and the other routed ones FULL, for all requests.

        Benchmarks switch patterns with it on a running engine whose policy is `static`; requests
        in flight go on under the new routes.
        """
        if self.config.needs_router:
            raise AssertionError("fix_routes: the policy is `router`")
        if self.config.free_kv and self.fixed_routes is not None:
            raise UnsupportedConfigurationError(
                'flux_fix_routes: expected an engine without "free_kv", found one that has given '
                'back keys of the layers that were SPARSE; start it without "free_kv"'
            )
        routes = [int(Route.UNDECIDED)] * self.table.num_layers
        for layer in self.routed_layers:
            routes[layer] = int(Route.FULL)
        for layer in sparse_layers:
            routes[layer] = int(Route.SPARSE)
        self.fixed_routes = routes
        self.table.fix(routes)
        self._known_routes[:] = routes

    def begin_step(self, batch: Batch) -> None:
        """Take up the rows of the step that is about to run."""
        if self.current is not None:
            self.end_step()  # a step that nobody sampled from
        is_new = np.array([self.table.slot(name) is None for name in batch.request_ids], bool)
        slots = self.table.acquire(batch.request_ids)
        settled = self.table.settled_prompt_len[slots] == batch.prompt_lens
        to_route = batch.is_prefill & ~settled
        self.current = RoutedBatch(batch, slots, is_new, to_route)

    def decide(self, layer: int, slots: torch.Tensor, pooled: torch.Tensor) -> None:
        """Route requests in one layer.

        Args:
            layer: index of the model's layer.
            slots: [R] int64 on the device.
            pooled: [R, H] float32 pooled query features, of this rank's heads alone.
        """
        assert self.router is not None
        logits = self.router(layer, self.reduce_mean(pooled))
        probability = full_probability(logits)
        self.table.full_probability[slots, layer] = probability
        self.table.routes[slots, layer] = choose_route(probability, self.config.threshold)

    def defer(self, work: Callable[[], None]) -> None:
        """Leave work on the device to `do_deferred`: nothing in the step waits for it."""
        self._deferred.append(work)

    # vLLM's steps make tensors in inference mode, which nothing else may write to.
    @torch.inference_mode()
    def do_deferred(self) -> None:
        """Launch what the step left for later; then all its routes are decided."""
        deferred, self._deferred = self._deferred, []
        for work in deferred:
            work()

    @torch.inference_mode()
    def end_step(self) -> None:
        """Settle the routes of prompts that are complete, and count the step.

        Called when the step's tokens are sampled, so that the device has work meanwhile. On a GPU
        the routes come back without waiting for them, so counting lags behind by the steps in
        flight.
        """
        self.do_deferred()
        current, self.current = self.current, None
        if current is None:
            # vLLM's empty step after the last request: nothing else may come for long.
            self._count_finished(wait=False)
            if self.reporter is not None:
                self.reporter.flush()
            return
        settled = current.to_route & current.batch.completes_prompt
        self.table.settled_prompt_len[current.slots[settled]] = current.batch.prompt_lens[settled]
        self._pending.append(PendingReadback.read(current, settled, self.table, self.fixed_routes))
        self._count_finished(wait=False)

    def _count_finished(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0].is_ready()):
            pending = self._pending.popleft()
            pending.wait()
            self._known_routes = _grown(self._known_routes, len(self.table.settled_prompt_len))
            # Only rows that were routed in the step can differ from what is known of their slot,
            # once a new request has forgotten the slot's former owner.
            if pending.is_new.any():
                self._known_routes[pending.slots[pending.is_new]] = int(Route.UNDECIDED)
            if pending.routes is not None:
                self._known_routes[pending.slots[pending.routed]] = pending.routes.numpy()
            routes = self._known_routes[pending.slots]
            if self.reporter is not None:
                self.reporter.record(pending.batch, routes[:, self._columns], pending.settled)
            if pending.full_probability is not None:
                self._note_decisions(pending, routes, pending.full_probability.numpy())

    def _note_decisions(
        self, pending: PendingReadback, routes: np.ndarray, full_probability: np.ndarray
    ) -> None:
        """Keep what the step decided: routes [R, layers], P(FULL) [P, layers]."""
        batch = pending.batch
        if self.reporter is not None and self.router is not None:
            self.reporter.record_probabilities(batch, full_probability[:, self._columns])
        if batch.is_warmup:
            return
        for index, row in enumerate(np.flatnonzero(pending.routed)):
            if not pending.settled[row]:
                continue
            name, prompt_tokens = batch.request_ids[row], int(batch.prompt_lens[row])
            probability = full_probability[index]
            self.recent.append(
                RouteDecision(name, prompt_tokens, routes[row].tolist(), probability.tolist())
            )
            if self.journal is not None:
                self.journal.append(name, prompt_tokens, routes[row], probability)

    def abandon_step(self) -> None:
        """Drop the current step after an error in it."""
        self.current = None
        self._deferred.clear()

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended."""
        self.table.release(request_ids)

    def status(self) -> dict[str, object]:
        """Describe the state, for tools and tests; waits for the steps in flight."""
        self._count_finished(wait=True)
        if self.reporter is not None:
            self.reporter.flush()
        return {
            "live_requests": len(self.table),
            "routed_layers": list(self.routed_layers),
            "recent": [asdict(decision) for decision in self.recent],
        }


def _grown(known: np.ndarray, slots: int) -> np.ndarray:
    missing = slots - len(known)
    if missing <= 0:
        return known
    return np.pad(known, ((0, missing), (0, 0)), constant_values=int(Route.UNDECIDED))


def recent_decisions(llm: object) -> list[RouteDecision]:
    """Return the latest routes of an offline `vllm.LLM` that serves with flux, oldest first."""
    statuses = llm.collective_rpc("flux_status")  # type: ignore[attr-defined]
    return [RouteDecision(**decision) for decision in statuses[0]["recent"]]
