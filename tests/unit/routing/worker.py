"""A FluxRuntime without an engine: batches by hand, a probe whose answers are written down."""

from typing import Any

import numpy as np
import torch

from flux_vllm.batch import Batch
from flux_vllm.config import FluxConfig
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.route import Route
from flux_vllm.routing.decode_counts import DecodeKeys
from flux_vllm.routing.prompts import Prompt
from flux_vllm.routing.runtime import FluxRuntime

CPU = torch.device("cpu")
L = 4
ROUTED = (0, 1, 3)
OPEN, SPARSE, FULL = (int(r) for r in (Route.UNDECIDED, Route.SPARSE, Route.FULL))
A, B, C = [SPARSE, FULL, SPARSE], [FULL, SPARSE, SPARSE], [SPARSE, SPARSE, FULL]
NONE = [OPEN] * 3
"""With the three above: routes of the routed layers."""
ANSWERS = {"a": A, "b": B, "c": C}
SINK_TOKENS, WINDOW_TOKENS = 8, 24
REACH = SINK_TOKENS + WINDOW_TOKENS
INFO = RouterInfo(
    base_model="",
    num_layers=L,
    head_dim=8,
    pool_tokens=16,
    sink_tokens=SINK_TOKENS,
    window_tokens=WINDOW_TOKENS,
)


class Recorder:
    """Stands in for RouteReporter."""

    def __init__(self) -> None:
        self.steps: list[tuple[tuple[str, ...], list[list[int]], list[bool]]] = []
        self.probabilities: list[list[list[float]]] = []
        self.unread = 0
        self.keys_counted: list[bool] = []
        self.decode_keys: list[DecodeKeys] = []

    def record(
        self,
        batch: Batch,
        routes: np.ndarray,
        decided: np.ndarray | None,
        counts_keys: bool = True,
    ) -> None:
        decided = np.zeros(len(batch), dtype=bool) if decided is None else decided
        self.steps.append((batch.request_ids, routes.tolist(), decided.tolist()))
        self.keys_counted.append(counts_keys)

    def record_decode(self, keys: DecodeKeys) -> None:
        self.decode_keys.append(keys)

    def flush(self) -> None:
        """Nothing waits here."""

    def record_probes(self, full_probability: np.ndarray, unread: int) -> None:
        self.probabilities.append(full_probability.tolist())
        self.unread += unread


class WrittenProbe:
    """Stands in for PromptProbe: routes of the routed layers by request id."""

    def __init__(self, answers: dict[str, list[int]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, int]] = []
        self.thresholds: list[float] = []

    def set_threshold(self, threshold: float) -> None:
        self.thresholds.append(threshold)

    def decide(self, prompt: Prompt) -> None:
        self.asked.append((prompt.request_id, prompt.length))
        wanted = dict(zip(ROUTED, self.answers[prompt.request_id], strict=True))
        routes = [wanted.get(layer, OPEN) for layer in range(L)]
        p_full = {FULL: 0.9, SPARSE: 0.1, OPEN: float("nan")}
        self.routes = torch.tensor(routes, dtype=torch.int8)
        self.full_probability = torch.tensor([p_full[route] for route in routes])


def make(
    policy: str = "router",
    answers: dict[str, list[int]] | None = None,
    max_requests: int = 2,
    info: RouterInfo = INFO,
    **config: Any,
) -> FluxRuntime:
    with_router = policy == "router"
    runtime = FluxRuntime(
        FluxConfig(policy=policy, **config),
        info if with_router else None,
        num_layers=L,
        routed_layers=ROUTED,
        max_requests=max_requests,
        device=CPU,
    )
    if with_router:
        runtime.probe = WrittenProbe(answers or {})  # type: ignore[assignment]
    runtime.reporter = Recorder()  # type: ignore[assignment]
    return runtime


def batch(*rows: tuple[str, int, int, int], is_warmup: bool = False) -> Batch:
    """Make a batch of rows (request id, computed, scheduled, prompt_len)."""
    numbers = np.array([row[1:] for row in rows], dtype=np.int64).reshape(len(rows), 3)
    return Batch(
        request_ids=tuple(row[0] for row in rows),
        prompt_lens=numbers[:, 2],
        computed=numbers[:, 0],
        scheduled=numbers[:, 1],
        is_prefill=numbers[:, 0] < numbers[:, 2],
        is_warmup=is_warmup,
    )


def begin(runtime: FluxRuntime, step: Batch, announced: str = "", readable: bool = True) -> None:
    """Do what the worker's hooks do before a batch.

    Args:
        announced: ids, letter by letter, of the requests that the scheduler calls new; default
            those that the table does not know.
        readable: whether their prompts are token ids.
    """
    names = announced or [n for n in step.request_ids if runtime.table.slot(n) is None]
    lengths = dict(zip(step.request_ids, step.prompt_lens.tolist(), strict=True))
    runtime.admit(
        Prompt(name, lengths[name], [0] * lengths[name] if readable else None) for name in names
    )
    if runtime.prompts_may_be_due():
        ends = (step.computed + step.scheduled).tolist()
        runtime.decide_due(dict(zip(step.request_ids, ends, strict=True)))
    runtime.begin_step(step)


def run(runtime: FluxRuntime, step: Batch, announced: str = "", readable: bool = True) -> list[str]:
    """Run one batch. Returns: the requests whose routes were decided for it."""
    begin(runtime, step, announced, readable)
    assert runtime.current is not None
    touched = runtime.current.touched
    decided = [] if touched is None else [step.request_ids[i] for i in touched.decided.nonzero()[0]]
    runtime.end_step()
    assert runtime.current is None
    return decided


def asked(runtime: FluxRuntime) -> list[tuple[str, int]]:
    """Return what was probed: (request id, prompt tokens)."""
    return runtime.probe.asked  # type: ignore[union-attr]


def recorded(runtime: FluxRuntime) -> list:
    """Return what the reporter got: (request ids, routes [R, routed layers], decided [R])."""
    return runtime.reporter.steps  # type: ignore[union-attr]
