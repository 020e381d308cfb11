"""FluxRuntime: everything one worker knows of its requests' routes and of the current batch."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from flux_vllm.batch import Batch
from flux_vllm.config import FluxConfig
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.metrics.journal import RouteJournal
from flux_vllm.metrics.reporter import RouteReporter
from flux_vllm.patterns import make_pattern
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.route import Route
from flux_vllm.routing.probe import PromptProbe
from flux_vllm.routing.prompts import OpenPrompts, Prompt
from flux_vllm.routing.readback import PendingReadback, RoutedBatch
from flux_vllm.routing.route_table import RouteTable

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


class FluxRuntime:
    """Routes requests in one worker.

    A request is taken up (`admit`) before the batch in which it runs first, and its routes are
    decided once: at once under a fixed policy, else before the first batch in which they matter
    (`decide_due`). From then on they stand until the request ends, through preemption too.

    Args:
        config: the operator's.
        info: the router file's; None where there is none.
        num_layers: layers of the model.
        routed_layers: those with a route; the others attend as the model has them.
        max_requests: slots to begin with.
        device: of the model.
    """

    def __init__(
        self,
        config: FluxConfig,
        info: RouterInfo | None,
        num_layers: int,
        routed_layers: tuple[int, ...],
        max_requests: int,
        device: torch.device,
    ) -> None:
        self.config = config
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
        self.probe: PromptProbe | None = None
        """Set once the model is there, for policy `router`."""
        self.current: RoutedBatch | None = None
        self.is_warming_up = False
        """While vLLM runs requests of its own, which are never counted."""
        self.reads_back = True
        """Whether routes come back to the host; all tensor-parallel ranks have the same."""
        self.reporter: RouteReporter | None = None
        self.journal: RouteJournal | None = None
        self.recent: deque[RouteDecision] = deque(maxlen=_RECENT_DECISIONS)
        self._open = OpenPrompts(self.sink_tokens + self.window_tokens)
        # Slots that `admit` and `decide_due` touched since the last batch.
        self._new: set[int] = set()
        self._decided: set[int] = set()
        self._probed: set[int] = set()
        self._pending: deque[PendingReadback] = deque()
        self._known_routes = np.empty((0, num_layers), dtype=np.int8)
        self._unread_routes = self._routes(() if info is None else info.always_sparse)
        self.fixed_routes: list[int] | None = None
        """By layer of the model, for policies that need no router."""
        if not config.needs_router:
            sparse = {"sparse": routed_layers, "static": config.sparse_layers}.get(config.policy)
            self.fix_routes(sparse or ())

    def _routes(self, sparse_layers: Iterable[int]) -> list[int]:
        routes = [int(Route.UNDECIDED)] * self.table.num_layers
        for layer in self.routed_layers:
            routes[layer] = int(Route.FULL)
        for layer in sparse_layers:
            routes[layer] = int(Route.SPARSE)
        return routes

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
        self.fixed_routes = self._routes(sparse_layers)
        self.table.fix(self.fixed_routes)
        self._known_routes[:] = self.fixed_routes

    def set_threshold(self, threshold: float) -> None:
        """Decide later prompts by another threshold.

        Benchmarks try thresholds with it on a running engine whose policy is `router`; what
        `/metrics` says of the router stays as it started.

        Raises: FluxConfigError: not a number from 0 to 1, or 0 with `free_kv`.
        """
        if self.probe is None:
            raise AssertionError("set_threshold: the policy is not `router`")
        self.config = replace(self.config, threshold=threshold)
        self.probe.set_threshold(threshold)

    # Before a batch.

    def admit(self, prompts: Iterable[Prompt]) -> None:
        """Take up requests that the scheduler announces, new or resumed after a preemption."""
        for prompt in prompts:
            slot, is_new = self.table.acquire(prompt.request_id)
            if is_new:
                self._new.add(slot)
            if self.table.settled_prompt_len[slot] == prompt.length:
                continue  # a session that takes more input has a longer one
            if self.fixed_routes is None:
                self._open.add(prompt)
            else:
                self._settle(slot, prompt)

    @property
    def has_open_prompts(self) -> bool:
        """Whether `decide_due` may have anything to do."""
        return len(self._open) > 0

    def decide_due(self, context_ends: Mapping[str, int]) -> None:
        """Decide the routes that matter in the batch that comes next, one probe a request.

        Args:
            context_ends: of each request of the batch, its tokens once it has run.

        Host sync: none.
        """
        for prompt in self._open.take_due(context_ends):
            slot, _ = self.table.acquire(prompt.request_id)
            if prompt.tokens is None:
                routes = torch.tensor(self._unread_routes, dtype=torch.int8)
                self.table.write(slot, routes, float("nan"))
            else:
                assert self.probe is not None
                self.probe.decide(prompt)
                self.table.write(slot, self.probe.routes, self.probe.full_probability)
                self._probed.add(slot)
            self._settle(slot, prompt)

    def _settle(self, slot: int, prompt: Prompt) -> None:
        self.table.settled_prompt_len[slot] = prompt.length
        self._decided.add(slot)

    def begin_step(self, batch: Batch) -> None:
        """Take up the rows of the batch that is about to run, of requests that were admitted."""
        if self.current is not None:
            self.end_step()  # a batch that nobody sampled from
        slots = self.table.slots(batch.request_ids)
        self.current = RoutedBatch(
            batch,
            slots,
            is_new=_among(slots, self._new),
            decided=_among(slots, self._decided),
            probed=_among(slots, self._probed),
        )
        self._forget_touched()

    # After a batch.

    # vLLM's steps make tensors in inference mode, which nothing else may write to.
    @torch.inference_mode()
    def end_step(self) -> PendingReadback | None:
        """Count the batch.

        Called when its tokens are sampled, so that the device has work meanwhile. On a GPU the
        routes come back without waiting for them, so counting lags behind by the steps in flight.

        Returns: the routes that were decided for the batch; None where there are none, and on
            ranks that read nothing back.
        """
        current, self.current = self.current, None
        if current is None:
            # vLLM's empty step after the last request: nothing else may come for long.
            self._count_pending(wait=False)
            if self.reporter is not None:
                self.reporter.flush()
            return None
        if not self.reads_back:
            return None
        pending = PendingReadback.read(current, self.table, self.fixed_routes)
        self._pending.append(pending)
        self._count_pending(wait=False)
        return None if pending.routes is None else pending

    def _count_pending(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0].is_ready()):
            pending = self._pending.popleft()
            pending.wait()
            rows = pending.rows
            self._known_routes = _grown(self._known_routes, len(self.table.settled_prompt_len))
            # Only rows whose routes were decided in the batch can differ from what is known of
            # their slot, once a new request has forgotten the slot's former owner.
            if rows.is_new.any():
                self._known_routes[rows.slots[rows.is_new]] = int(Route.UNDECIDED)
            if pending.routes is not None:
                self._known_routes[rows.slots[rows.decided]] = pending.routes.numpy()
            routes = self._known_routes[rows.slots]
            if self.reporter is not None:
                self.reporter.record(rows.batch, routes[:, self._columns], rows.decided)
            if pending.full_probability is not None:
                self._note_decisions(rows, routes, pending.full_probability.numpy())

    def _note_decisions(
        self, rows: RoutedBatch, routes: np.ndarray, full_probability: np.ndarray
    ) -> None:
        """Keep what was decided for a batch: routes [R, layers], P(FULL) [decided, layers]."""
        batch = rows.batch
        if batch.is_warmup:
            return
        probed = rows.probed[rows.decided]
        if self.reporter is not None and self.fixed_routes is None:
            self.reporter.record_probes(
                full_probability[probed][:, self._columns], int((~probed).sum())
            )
        for row, probability in zip(np.flatnonzero(rows.decided), full_probability, strict=True):
            name, prompt_tokens = batch.request_ids[row], int(batch.prompt_lens[row])
            self.recent.append(
                RouteDecision(name, prompt_tokens, routes[row].tolist(), probability.tolist())
            )
            if self.journal is not None:
                self.journal.append(name, prompt_tokens, routes[row], probability)

    def abandon_step(self) -> None:
        """Drop the current batch after an error in it."""
        self.current = None
        self._forget_touched()

    def _forget_touched(self) -> None:
        for slots in (self._new, self._decided, self._probed):
            slots.clear()

    def finish(self, request_ids: Sequence[str] | set[str]) -> None:
        """Forget requests that ended."""
        self._open.discard(request_ids)
        self.table.release(request_ids)

    def status(self) -> dict[str, object]:
        """Describe the state, for tools and tests; waits for the steps in flight."""
        self._count_pending(wait=True)
        if self.reporter is not None:
            self.reporter.flush()
        return {
            "live_requests": len(self.table),
            "routed_layers": list(self.routed_layers),
            "recent": [asdict(decision) for decision in self.recent],
        }


def _among(slots: np.ndarray, wanted: set[int]) -> np.ndarray:
    """Say which of the slots [R] are wanted; by far most often none."""
    if not wanted:
        return np.zeros(len(slots), dtype=bool)
    return np.isin(slots, list(wanted))


def _grown(known: np.ndarray, slots: int) -> np.ndarray:
    missing = slots - len(known)
    if missing <= 0:
        return known
    return np.pad(known, ((0, missing), (0, 0)), constant_values=int(Route.UNDECIDED))


def recent_decisions(llm: object) -> list[RouteDecision]:
    """Return the latest routes of an offline `vllm.LLM` that serves with flux, oldest first."""
    statuses = llm.collective_rpc("flux_status")  # type: ignore[attr-defined]
    return [RouteDecision(**decision) for decision in statuses[0]["recent"]]
