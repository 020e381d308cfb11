"""What the tests add to vLLM's workers (`worker_extension_cls`): each rank's routes, step by step.

A request's slot in the route table is freed when it ends, so every step leaves a copy. Copies stay
on the device until they are asked for: the log makes no step wait for another.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flux_vllm.router.state import to_device


@dataclass
class RankStep:
    """One step of one rank.

    Attributes:
        request_ids: R of them, in row order.
        is_prefill: [R] bool.
        decided: [R] bool: the step chose routes for the row.
        routes: [R, layers of the model] int8, as the row attended.
        p_full: likewise float32, NaN where no router decided.
    """

    request_ids: tuple[str, ...]
    is_prefill: np.ndarray
    decided: np.ndarray
    routes: np.ndarray
    p_full: np.ndarray


@dataclass
class RankLog:
    """What one rank did since its log was last taken.

    Attributes:
        steps: in order, warm-up left out.
        unrouted: decode rows without a route, as the kernels' own counter says; None on a CPU,
            which has none.
    """

    steps: list[RankStep]
    unrouted: int | None


class RankLogger:
    """Mixed into vLLM's worker; its methods are called through `collective_rpc`."""

    def begin_rank_log(self: Any) -> None:
        """Log every step from now on."""
        runtime = self.flux_status.__self__
        self._rank_steps: list[tuple] = []
        self._unrouted_before = _unrouted_rows()
        runtime.end_step = _logged(runtime, runtime.end_step, self._rank_steps)

    def take_rank_log(self: Any) -> RankLog:
        """Return what was logged, and begin anew; waits for the steps in flight."""
        steps = [
            RankStep(*facts, *(tensor.cpu().numpy() for tensor in tensors))
            for facts, tensors in self._rank_steps
        ]
        self._rank_steps.clear()
        self.flux_status()  # counts the steps in flight
        before, self._unrouted_before = self._unrouted_before, _unrouted_rows()
        if before is None:
            return RankLog(steps, None)
        unrouted = sum(
            count - before.get(views, 0) for views, count in self._unrouted_before.items()
        )
        return RankLog(steps, unrouted)


def _logged(runtime: Any, end_step: Callable[[], None], steps: list[tuple]) -> Callable[[], None]:
    """Copy what a step's rows have in the route table before it ends."""

    @torch.inference_mode()
    def logged() -> None:
        step, table = runtime.current, runtime.table
        if step is not None and not step.batch.is_warmup:
            runtime.do_deferred()
            rows = to_device(step.slots, table.device)
            facts = (step.batch.request_ids, step.batch.is_prefill, step.to_route)
            steps.append((facts, (table.routes[rows], table.full_probability[rows])))
        end_step()

    return logged


def _unrouted_rows() -> dict[Any, int] | None:
    """Read this process's device counters of unrouted decode rows, by the buffers they are in.

    An engine that ended leaves its own for a while, so a sum would not do.
    """
    if not torch.cuda.is_available():
        return None
    from flux_vllm.attention_backend.cuda.views import ViewBuffers

    # vLLM's runners keep their metadata builders in different places.
    views = [found for found in gc.get_objects() if type(found) is ViewBuffers]
    return {each: int(each.unrouted) for each in views}
