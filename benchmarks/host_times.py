"""Host time of the functions that a step passes through: flux's, and vLLM's around them."""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.worker_extension import BenchmarkWorker

_CUDA = "flux_vllm.attention_backend.cuda"
_FLASH = "vllm.v1.attention.backends.flash_attn"
FUNCTIONS = (
    ("flux_vllm.routing.runtime", "FluxRuntime", "admit"),
    ("flux_vllm.routing.runtime", "FluxRuntime", "decide_due"),
    ("flux_vllm.routing.probe", "PromptProbe", "decide"),
    ("flux_vllm.routing.runtime", "FluxRuntime", "begin_step"),
    (_FLASH, "FlashAttentionMetadataBuilder", "build"),
    (f"{_CUDA}.backend", "FluxCUDAMetadataBuilder", "build"),
    (f"{_CUDA}.views", "ViewBuffers", "write"),
    (_FLASH, "FlashAttentionImpl", "forward"),
    (f"{_CUDA}.backend", "FluxCUDAImpl", "forward"),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl", "forward"),
    ("flux_vllm.attention_backend.cpu.backend", "FluxCPUImpl", "forward"),
    ("flux_vllm.routing.runtime", "FluxRuntime", "end_step"),
    ("flux_vllm.routing.readback", "PendingReadback", "read"),
    ("flux_vllm.routing.runtime", "FluxRuntime", "_count_pending"),
)
"""Module, class or None, function; times hold those of the functions called within."""


class HostTimer:
    """Adds up the calls and the time of functions."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[int, float]] = {}
        """By function: calls, seconds."""
        self._originals: list[tuple[Any, str, Any]] = []

    def time(self, owner: Any, name: str) -> None:
        """Time a function of a module, or a method that a class defines itself, until `stop`.

        Raises: KeyError: there is none.
        """
        found = vars(owner)[name]
        self._originals.append((owner, name, found))
        label = f"{owner.__name__.rpartition('.')[2]}.{name}"
        self.totals[label] = (0, 0.0)
        if isinstance(found, classmethod):
            setattr(owner, name, classmethod(self._timed(label, found.__func__)))
        else:
            setattr(owner, name, self._timed(label, found))

    def _timed(self, label: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                calls, seconds = self.totals[label]
                self.totals[label] = (calls + 1, seconds + time.perf_counter() - begin)

        return timed

    def stop(self) -> None:
        """Leave the functions as they were."""
        for owner, name, found in self._originals:
            setattr(owner, name, found)
        self._originals.clear()


class TimedWorker(BenchmarkWorker):
    """A worker that tells the host time of its steps."""

    _host_timer: HostTimer

    def begin_host_times(self: Any) -> None:
        """Time the runner's two halves of a step, and those of `FUNCTIONS` that are loaded.

        Raises: AttributeError, KeyError: a loaded module has no such class or function.
        """
        self._host_timer = timer = HostTimer()
        runner = next(c for c in type(self.model_runner).__mro__ if "sample_tokens" in vars(c))
        for name in ("execute_model", "sample_tokens"):
            timer.time(runner, name)
        for module, owner, name in FUNCTIONS:
            if module in sys.modules:
                loaded = sys.modules[module]
                timer.time(loaded if owner is None else getattr(loaded, owner), name)

    def end_host_times(self: Any) -> dict[str, tuple[int, float]]:
        """Stop. Returns: by function, of those that were called: calls, seconds."""
        self._host_timer.stop()
        return {name: total for name, total in self._host_timer.totals.items() if total[0]}
