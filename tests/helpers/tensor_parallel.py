"""One model on one rank and on several: the same requests, each rank's routes, and comparisons.

A probe attends to everything, so a layer's P(FULL) does not depend on other layers' routes: where
one route of a request differs between engines, because P(FULL) was near the threshold, its others
are still comparable.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.engine import Answer, Engine
from tests.helpers.rank_log import RankLog

THRESHOLD = 0.5
NEAR_THRESHOLD = 0.01
"""Within this of the threshold either route may be taken."""
UNDECIDED = -1
_ENVIRONMENT = {
    # The test's process has threads, which a fork would not survive.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # NVLink multicast, where a test is killed in the midst of it, can take GPUs that others share
    # out of service. Each of these would use it; vLLM's own all-reduce does not.
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NCCL_NVLS_ENABLE": "0",
}
_NO_FUSED_ALLREDUCE = {"pass_config": {"fuse_allreduce_rms": False}}
"""Likewise: it is FlashInfer's."""


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes that start meanwhile; others that change stay changed."""
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class RankedEngine(Engine):
    """An engine whose workers, one a rank, log what their route tables hold.

    Args:
        model: folder.
        flux: the flux configuration; None serves without it, and nothing is logged.
        ranks: of tensor parallelism; a single one lives in this process.
        arguments: further arguments of `vllm.LLM`.
    """

    def __init__(
        self, model: Path, flux: dict[str, Any] | None, ranks: int, **arguments: Any
    ) -> None:
        self.rank_logs: list[RankLog] | None = None
        if flux is not None:
            arguments["worker_extension_cls"] = "tests.helpers.rank_log.RankLogger"
        if ranks > 1:
            arguments |= {
                "tensor_parallel_size": ranks,
                "distributed_executor_backend": "mp",
                "compilation_config": _NO_FUSED_ALLREDUCE,
            }
        with _environment(_ENVIRONMENT):
            super().__init__(model, flux, **arguments)
        self._is_logged, self.has_flux = self.has_flux, False  # its reader knows one rank
        if self._is_logged:
            self.llm.collective_rpc("begin_rank_log")

    def generate(self, *arguments: Any, **keywords: Any) -> list[Answer]:
        """Answer prompts together, greedily; `rank_logs` then has what each rank did."""
        if self._is_logged:
            self.llm.collective_rpc("take_rank_log")
        self.rank_logs = None
        return super().generate(*arguments, **keywords)

    def _answer(self, output: Any) -> Answer:
        answer = super()._answer(output)
        if not self._is_logged:
            return answer
        if self.rank_logs is None:
            self.rank_logs = self.llm.collective_rpc("take_rank_log")
        name = next(n for n in self._steps if n.rsplit("-", 1)[0] == output.request_id)
        for step in self.rank_logs[0].steps:
            row = step.request_ids.index(name) if name in step.request_ids else None
            if row is not None and step.decided[row]:
                assert answer.routes is None, f"{name} was routed twice"
                answer.routes = step.routes[row].tolist()
                answer.p_full = step.p_full[row].tolist()
        return answer


def assert_ranks_alike(logs: Sequence[RankLog]) -> str:
    """Check that all ranks took the same routes, bit by bit, and that none was missing.

    Returns: str: what was compared.
    """
    first, routes = logs[0], 0
    for rank, log in enumerate(logs):
        assert len(log.steps) == len(first.steps), f"rank {rank}: {len(log.steps)} steps"
        for number, (step, expected) in enumerate(zip(log.steps, first.steps, strict=True)):
            place = f"rank {rank}, step {number}"
            assert step.request_ids == expected.request_ids, place
            assert step.routes.tobytes() == expected.routes.tobytes(), place
            # Routes follow from it: were it not equal, equal routes would be luck.
            assert step.p_full.tobytes() == expected.p_full.tobytes(), place
            routed = step.routes[step.is_long]
            assert (routed != UNDECIDED).all(), f"{place}: a row without a route"
            routes += routed.size
    return f"{routes} routes of {len(logs)} ranks and {len(first.steps)} steps bitwise equal"


@dataclass
class RouteComparison:
    """The decisions of two engines on the same prompts.

    Attributes:
        compared: decisions whose P(FULL) is clear of the threshold, hence equal.
        near: decisions within `NEAR_THRESHOLD` of it.
        worst: largest difference of P(FULL).
        parted: prompts with a different route, by index.
    """

    compared: int = 0
    near: int = 0
    worst: float = 0.0
    parted: set[int] = field(default_factory=set)


def compare_routes(ones: Sequence[Answer], others: Sequence[Answer]) -> RouteComparison:
    """Check the routes of the second engine wherever the first's P(FULL) is clear."""
    found = RouteComparison()
    for index, (one, other) in enumerate(zip(ones, others, strict=True)):
        assert (one.routes is None) == (other.routes is None), f"prompt {index}"
        if one.routes is None:
            continue
        assert np.isfinite(one.p_full).all()
        columns = zip(one.routes, other.routes, one.p_full, other.p_full, strict=True)
        for layer, (route, rival, p_full, rival_p_full) in enumerate(columns):
            is_near = abs(p_full - THRESHOLD) <= NEAR_THRESHOLD
            found.near += is_near
            found.compared += not is_near
            found.worst = max(found.worst, abs(p_full - rival_p_full))
            if route != rival:
                place = f"prompt {index}, layer {layer}"
                assert is_near, f"{place}: P(FULL) {p_full:.4f} and {rival_p_full:.4f}"
                found.parted.add(index)
    return found


def logprob_difference(
    ones: Sequence[Answer], others: Sequence[Answer], parted: Collection[int] = ()
) -> tuple[float, float, int]:
    """Compare log-probabilities of prompts, and of outputs until their tokens differ.

    Args:
        ones: of one engine.
        others: of the other.
        parted: prompts to leave out, by index.
    Returns: (worst of a prompt token, worst of an output token, output tokens compared).
    """
    prompt, output, tokens = 0.0, 0.0, 0
    for index, (one, other) in enumerate(zip(ones, others, strict=True)):
        if index in parted:
            continue
        pairs = zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
        prompt = max([prompt, *(abs(a - b) for a, b in pairs)])
        for a, b, token, rival in zip(
            one.logprobs, other.logprobs, one.tokens, other.tokens, strict=True
        ):
            if token != rival:
                break
            output, tokens = max(output, abs(a - b)), tokens + 1
    return prompt, output, tokens
