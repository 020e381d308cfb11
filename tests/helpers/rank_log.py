"""What the tests add to vLLM's workers (`worker_extension_cls`): each rank's routes, step by step.

A request's slot in the route table is freed when it ends, so every step leaves a copy. Copies stay
on the device until they are asked for: the log makes no step wait for another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flux_vllm.transfer import to_device


@dataclass
class RankStep:
    """One step of one rank.

    Attributes:
        request_ids: R of them, in row order.
        is_long: [R] bool: the row's context is longer than sinks and window, so it has routes.
        decided: [R] bool: routes were decided for the step.
        routes: [R, layers of the model] int8, as the row attended.
        p_full: likewise float32, NaN where no router decided.
    """

    request_ids: tuple[str, ...]
    is_long: np.ndarray
    decided: np.ndarray
    routes: np.ndarray
    p_full: np.ndarray


@dataclass
class RankLog:
    """What one rank did since its log was last taken.

    Attributes:
        steps: in order, warm-up left out.
    """

    steps: list[RankStep]


class RankLogger:
    """Mixed into vLLM's worker; its methods are called through `collective_rpc`."""

    def begin_rank_log(self: Any) -> None:
        """Log every step from now on."""
        runtime = self.flux_status.__self__
        if runtime.table.device.type == "cpu" and self.parallel_config.pipeline_parallel_size > 1:
            # vLLM makes a later stage's buffers as it warms up, which an eager CPU worker skips.
            self.model_runner._dummy_run(1)
        self._rank_steps: list[tuple] = []
        runtime.end_step = _logged(runtime, runtime.end_step, self._rank_steps)

    def take_rank_log(self: Any) -> RankLog:
        """Return what was logged, and begin anew; waits for the steps in flight."""
        steps = [
            RankStep(*facts, *(tensor.cpu().numpy() for tensor in tensors))
            for facts, tensors in self._rank_steps
        ]
        self._rank_steps.clear()
        self.flux_status()  # counts the steps in flight
        return RankLog(steps)


def _logged(runtime: Any, end_step: Callable[[], Any], steps: list[tuple]) -> Callable[[], Any]:
    """Copy what a step's rows have in the route table before it ends."""

    @torch.inference_mode()
    def logged() -> Any:
        current, table = runtime.current, runtime.table
        if current is not None and not current.batch.is_warmup:
            rows, batch = to_device(current.slots, table.device), current.batch
            is_long = batch.computed + batch.scheduled > runtime.sink_tokens + runtime.window_tokens
            touched = current.touched
            decided = np.zeros(len(batch), bool) if touched is None else touched.decided
            facts = (batch.request_ids, is_long, decided)
            steps.append((facts, (table.routes[rows], table.full_probability[rows])))
        return end_step()

    return logged
