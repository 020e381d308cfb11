"""FluxRuntime: everything one worker knows of its requests' routes and of the current batch."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

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
from flux_vllm.routing.decode_counts import DecodeCounts, DecodeKeys
from flux_vllm.routing.known_routes import KnownRoutes
from flux_vllm.routing.probe import PromptProbe
from flux_vllm.routing.prompts import OpenPrompts, Prompt
from flux_vllm.routing.readback import PendingReadback, RoutedBatch, TouchedRows
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
        step_tokens: the most that a step adds to what is known of a request, drafts included.
        owners: of the routed layers, those that take another's route, and whose.
    """

    def __init__(
        self,
        config: FluxConfig,
        info: RouterInfo | None,
        num_layers: int,
        routed_layers: tuple[int, ...],
        max_requests: int,
        device: torch.device,
        step_tokens: int = 1,
        owners: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.config = config
        self.info = info
        self.routed_layers = routed_layers
        self._columns = np.array(routed_layers, dtype=np.int64)
        self._owners = owners
        self.sink_tokens, self.window_tokens = config.window(info)
        self.pattern = make_pattern(
            config.pattern_name(info),
            self.sink_tokens,
            self.window_tokens,
            config.pattern_options,
        )
        self.full_decode_tokens = config.full_decode(info)
        self.table = RouteTable(num_layers, max_requests, device)
        self.probe: PromptProbe | None = None
        """Set once the model is there, for policy `router`."""
        self.current: RoutedBatch | None = None
        self.step_tokens = step_tokens
        self.decode_counts: DecodeCounts | None = None
        """Set where kernels count what decode steps read; the host counts all other steps."""
        self.is_warming_up = False
        """While vLLM runs requests of its own, which are never counted."""
        self.warm_ups: dict[Hashable, Callable[[object], None]] = {}
        """Of the backend: calls of its kernels, by what they are for."""
        self.reads_back = True
        """Whether routes come back to the host; all tensor-parallel ranks have the same."""
        self.reporter: RouteReporter | None = None
        self.journal: RouteJournal | None = None
        self.recent: deque[RouteDecision] = deque(maxlen=_RECENT_DECISIONS)
        self._open = OpenPrompts(self.sink_tokens + self.window_tokens, step_tokens)
        self._rows = _Rows((), np.empty(0, dtype=np.int64), -1)
        # Slots that `admit` and `decide_due` touched since the last batch.
        self._new: set[int] = set()
        self._decided: set[int] = set()
        self._probed: set[int] = set()
        self._readback: PendingReadback | None = None
        self._pending: deque[PendingReadback] = deque()
        self._has_decoded = False
        self._known = KnownRoutes(self.table, routed_layers)
        self._unread_routes = self._routes(() if info is None else info.always_sparse)
        self.is_decided = np.array(self._unread_routes) != Route.UNDECIDED
        """[layers of the model] bool: layers that have a route once a request's are decided."""
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
        for layer, owner in self._owners.items():
            routes[layer] = routes[owner]
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
        self._known.fix(self.fixed_routes)

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
                self._known.forget(slot)
            if self.table.settled_prompt_len[slot] == prompt.length:
                continue  # a session that takes more input has a longer one
            if self.fixed_routes is None:
                self._open.add(prompt)
            else:
                self._settle(slot, prompt)

    def prompts_may_be_due(self) -> bool:
        """Say, once a step, whether `decide_due` may have anything to do in it."""
        return self._open.begin_step()

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
        self.table.settle(slot, prompt.length, self.full_decode_tokens)
        self._decided.add(slot)
        self._known.forget(slot)

    # vLLM's steps make tensors in inference mode, which nothing else may write to.
    @torch.inference_mode()
    def begin_step(self, batch: Batch) -> None:
        """Take up the rows of the batch that is about to run, of requests that were admitted."""
        if self.current is not None:
            self.end_step()  # a batch that nobody sampled from
        slots = self._slots(batch.request_ids)
        touched = None
        if self._new or self._decided:
            touched = TouchedRows(
                _among(slots, self._new),
                _among(slots, self._decided),
                _among(slots, self._probed),
            )
            self._forget_touched()
        self.current = RoutedBatch(batch, slots, touched)
        # At once: the copies follow the probes, and the batch's later layers may find them there.
        self._readback = None
        if touched is not None and self.reads_back:
            self._readback = PendingReadback.read(self.current, self.table, self.fixed_routes)

    def _slots(self, request_ids: tuple[str, ...]) -> np.ndarray:
        """Return the rows' slots [R]: the same array as long as nothing of them changes."""
        rows, version = self._rows, self.table.version
        if rows.version != version or rows.request_ids != request_ids:
            rows = self._rows = _Rows(request_ids, self.table.slots(request_ids), version)
        return rows.slots

    def known_routes(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the routes of rows of the current batch, if the host knows them all.

        Args:
            rows: [P] int64: their places in the batch.

        Returns: [P or 1, layers of the model] int8.
        """
        if self.fixed_routes is not None:
            return np.array([self.fixed_routes], dtype=np.int8)
        assert self.current is not None
        return self._known.of_rows(self.current, self._readback, rows)

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
            # The device is asked only if it has anything to tell: a request may be on its way.
            self._flush(asks_device=self._has_decoded)
            return None
        if not self.reads_back:
            return None
        pending, self._readback = self._readback, None
        if self._is_counted_on_device(current.batch):
            self._has_decoded = True
        elif pending is None:
            pending = PendingReadback.read(current, self.table, self.fixed_routes)
        if pending is not None:
            self._pending.append(pending)
        if self._pending:
            self._count_pending(wait=False)
        if self.decode_counts is not None and not self.is_warming_up:
            self._count_decode(self.decode_counts.poll())
        return None if pending is None or pending.routes is None else pending

    def _is_counted_on_device(self, batch: Batch) -> bool:
        return self.decode_counts is not None and not batch.has_prefill

    def _count_decode(self, keys: DecodeKeys | None) -> None:
        if keys is not None and self.reporter is not None:
            self.reporter.record_decode(keys)
            self.reporter.flush()

    def _flush(self, asks_device: bool = True) -> None:
        """Count all that ran until now; waits for the steps in flight if the device is asked."""
        if self.decode_counts is not None and self.reads_back and asks_device:
            self._has_decoded = False
            self._count_decode(self.decode_counts.read())
        if self.reporter is not None:
            self.reporter.flush()

    def _count_pending(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0].is_ready()):
            pending = self._pending.popleft()
            pending.wait()
            rows, touched = pending.rows, pending.rows.touched
            routes = self._known.take(pending)
            if self.reporter is not None:
                self.reporter.record(
                    rows.batch,
                    routes,
                    None if touched is None else touched.decided,
                    counts_keys=not self._is_counted_on_device(rows.batch),
                )
            if pending.full_probability is not None:
                assert touched is not None
                self._note_decisions(rows, touched, pending.full_probability.numpy())

    def _note_decisions(
        self, rows: RoutedBatch, touched: TouchedRows, full_probability: np.ndarray
    ) -> None:
        """Keep what was decided for a batch: P(FULL) [decided, layers]."""
        batch = rows.batch
        if batch.is_warmup:
            return
        probed = touched.probed[touched.decided]
        if self.reporter is not None and self.fixed_routes is None:
            self.reporter.record_probes(
                full_probability[probed][:, self._columns], int((~probed).sum())
            )
        for row, probability in zip(np.flatnonzero(touched.decided), full_probability, strict=True):
            name, prompt_tokens = batch.request_ids[row], int(batch.prompt_lens[row])
            routes = self._known.of_slot(int(rows.slots[row]))
            self.recent.append(
                RouteDecision(name, prompt_tokens, routes.tolist(), probability.tolist())
            )
            if self.journal is not None:
                self.journal.append(name, prompt_tokens, routes, probability)

    def abandon_step(self) -> None:
        """Drop the current batch after an error in it."""
        self.current = self._readback = None
        self._forget_touched()

    def _forget_touched(self) -> None:
        for slots in (self._new, self._decided, self._probed):
            slots.clear()

    def warm_up(self, runner: object) -> None:
        """Let the backend call all that it may need; `runner` is vLLM's, with its KV cache."""
        if self.probe is not None and self.warm_ups:
            self.probe.decide(Prompt("", 1, [0]))
        for call in self.warm_ups.values():
            call(runner)

    def end_warm_up(self) -> None:
        """Begin to count; what vLLM's own requests read counts nowhere. Waits for them."""
        self.is_warming_up = False
        if self.decode_counts is not None:
            self.decode_counts.read()

    def finish(self, request_ids: Sequence[str] | set[str]) -> None:
        """Forget requests that ended."""
        if request_ids:
            self._open.discard(request_ids)
            self.table.release(request_ids)

    def status(self) -> dict[str, object]:
        """Describe the state, for tools and tests; waits for the steps in flight."""
        self._count_pending(wait=True)
        self._flush()
        return {
            "live_requests": len(self.table),
            "routed_layers": list(self.routed_layers),
            "recent": [asdict(decision) for decision in self.recent],
        }


class _Rows(NamedTuple):
    """The rows of the latest batch."""

    request_ids: tuple[str, ...]
    slots: np.ndarray
    """[R] int64."""
    version: int
    """Of the route table."""


def _among(slots: np.ndarray, wanted: set[int]) -> np.ndarray:
    """Say which of the slots [R] are wanted."""
    return np.fromiter((slot in wanted for slot in slots.tolist()), np.bool_, len(slots))


def recent_decisions(llm: object) -> list[RouteDecision]:
    """Return the latest routes of an offline `vllm.LLM` that serves with flux, oldest first."""
    statuses = llm.collective_rpc("flux_status")  # type: ignore[attr-defined]
    return [RouteDecision(**decision) for decision in statuses[0]["recent"]]
