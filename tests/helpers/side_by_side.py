"""Engines that start side by side, each in a process of its own, and answer the same prompts.

Starting is what takes the time, and most of it is one core's work.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.helpers.engine import Answer
from tests.helpers.metrics import parse, total
from tests.helpers.rank_log import RankLog
from tests.helpers.tensor_parallel import RankedEngine

_engines = itertools.count()


@dataclass
class Setup:
    """One engine.

    Attributes:
        model: folder.
        flux: the flux configuration; None serves without it.
        ranks: of tensor parallelism.
        arguments: further arguments of `vllm.LLM`.
    """

    model: Path
    flux: dict[str, Any] | None
    ranks: int
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Served:
    """What one engine answered to all prompts at once.

    Attributes:
        answers: in the prompts' order.
        logs: by rank; None without flux.
        unrouted: flux_unrouted_rows_total, which the first rank counts for all; 0 without flux.
        decisions: flux_route_decisions_total, over all layers and both routes; likewise.
    """

    answers: list[Answer]
    logs: list[RankLog] | None
    unrouted: float
    decisions: float


def serve(setup: Setup, prompts: Sequence[Sequence[int]], max_tokens: int) -> Served:
    """Start an engine, ask it all prompts at once, and take it down."""
    from prometheus_client import generate_latest

    # Engines that this process had before are in its metrics too.
    name = f"{setup.model.name}-{next(_engines)}"
    arguments = setup.arguments | {"served_model_name": name}
    with RankedEngine(setup.model, setup.flux, setup.ranks, **arguments) as engine:
        answers = engine.generate(prompts, max_tokens, prompt_logprobs=True)
        unrouted = decisions = 0.0
        if setup.flux is not None:
            metrics = parse(generate_latest().decode())
            unrouted = total(metrics, "flux_unrouted_rows_total", model_name=name)
            decisions = total(metrics, "flux_route_decisions_total", model_name=name)
        return Served(answers, engine.rank_logs, unrouted, decisions)


def serve_side_by_side(
    setups: Sequence[Setup], prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[Served]:
    """Serve the first setup in this process, for which pytest's fixtures hold, others beside it.

    No two of them meet at a port: vLLM's ranks find each other through a file.

    Args:
        setups: two or more; their memory is taken at once.
        prompts: for all of them.
        max_tokens: of each output.
    Returns: list[Served]: in the setups' order.
    """
    first, *others = setups
    with ProcessPoolExecutor(len(others), get_context("spawn")) as pool:
        started = [pool.submit(serve, setup, prompts, max_tokens) for setup in others]
        return [serve(first, prompts, max_tokens), *(each.result() for each in started)]
