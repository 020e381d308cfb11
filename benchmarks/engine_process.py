"""A `vllm.LLM` driven step by step, in a process of its own: several load and live side by side."""

import os
import signal
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.engine_driver import EngineDriver


class Engine:
    """The caller's end of an engine process; engines made one after another load together.

    Args:
        vocab_size: of the model; prompts are random tokens.
        arguments: of `vllm.LLM`; a `worker_extension_cls` extends `BenchmarkWorker`.
    """

    def __init__(self, vocab_size: int, **arguments: Any) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon: vLLM may start processes of its own.
        self._process = context.Process(target=_serve, args=(theirs, vocab_size, arguments))
        self._process.start()
        theirs.close()
        self._is_ready = False

    def wait(self) -> None:
        """Wait until the engine is loaded.

        Raises: RuntimeError: it failed, with its error.
        """
        if not self._is_ready:
            self._receive()
            self._is_ready = True

    def pause(self) -> None:
        """Stop the process, which is asked for nothing meanwhile, so that no thread of it wakes."""
        self.wait()
        os.kill(self._pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the process go on."""
        os.kill(self._pid, signal.SIGCONT)

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def settings(self) -> dict[str, Any]:
        """Say what vLLM made of the arguments that times depend on, its own defaults included."""
        return self._call("settings")

    def prefill_seconds(self, tokens: int, times: int = 1) -> float:
        """Time a request of random tokens to its first output token.

        Args:
            tokens: of the prompt.
            times: requests, one after another; the median counts. A single short one after a pause
                would time how the processor wakes up.
        """
        return self._call("prefill_seconds", tokens, times)

    def peak_memory(self) -> tuple[int, int] | None:
        """Return bytes of tensors on the GPU: (the most during the latest `prefill_seconds`, now).

        None on a CPU.
        """
        return self._call("peak_memory")

    def profile(self, tokens: int) -> list[tuple[str, int, float]]:
        """List the GPU kernels of one prefill: name, calls, total milliseconds; longest first."""
        return self._call("profile", tokens)

    def profile_steps(self, steps: int, batch: int) -> list[tuple[str, int, float]]:
        """List the GPU kernels of decode steps, likewise, summed; graphs' are among them.

        Args:
            steps: decode steps, counted together.
            batch: requests, which all decode.
        """
        return self._call("profile_steps", steps, batch)

    def start(self, context: int, batch: int, attend: bool = True) -> list[str]:
        """Bring requests into decode.

        Args:
            context: tokens of each prompt.
            batch: requests.
            attend: False skips attention in prefill (`BenchmarkWorker.skip_attention`).

        Returns: their ids.
        """
        return self._call("start", context, batch, attend)

    def step_seconds(self, steps: int, batch: int) -> float:
        """Time a decode step, the mean of so many; all requests must decode in each."""
        return self._call("step_seconds", steps, batch)

    def mixed_seconds(self, tokens: int, batch: int, times: int) -> list[float]:
        """Time prompts beside running requests, each to its first output token.

        Args:
            tokens: of each prompt.
            batch: requests that decode meanwhile, from `start`.
            times: prompts, one after another.
        """
        return self._call("mixed_seconds", tokens, batch, times)

    def set_sparse_share(self, share: float, tokens: int) -> float:
        """Choose the threshold at which a router makes such a share of the layers SPARSE.

        Args:
            share: wanted.
            tokens: of the prompts that are tried.

        Returns: the share of the last prompt's layers.
        """
        return self._call("set_sparse_share", share, tokens)

    def answer_queue(self, context: int, tokens: int, seconds: float) -> dict[str, float]:
        """Answer requests of a queue that is never empty; see `QueueLoad.run`.

        Args:
            context: tokens of each prompt.
            tokens: that each request gets.
            seconds: most that it may take.
        """
        return self._call("answer_queue", context, tokens, seconds)

    def answer_prompts(
        self, prompts: Sequence[Sequence[int]], tokens: int, stop_ids: Sequence[int]
    ) -> dict[str, Any]:
        """Answer prompts that are all there from the beginning; see `prompt_load.answer_prompts`.

        Args:
            prompts: token ids.
            tokens: most of an answer.
            stop_ids: tokens that end one.

        Returns: as there, and the `routes` of flux engines, [R, layers].
        """
        return self._call("answer_prompts", prompts, tokens, stop_ids)

    def soak(self, prompts: Sequence[Sequence[int]], requests: int, seed: int) -> dict[str, int]:
        """Run mixed requests, some of them aborted; see `prompt_load.soak`."""
        return self._call("soak", prompts, requests, seed)

    def host_times(self, steps: int, batch: int) -> dict[str, float]:
        """Time functions on the host in decode steps: microseconds a step, callees included.

        Args:
            steps: decode steps.
            batch: requests, which all decode.
        """
        return self._call("host_times", steps, batch)

    def stop(self, names: Sequence[str]) -> None:
        """End requests."""
        self._call("stop", names)

    def fix_routes(self, layers: Sequence[int] | None) -> None:
        """Make these layers SPARSE and the others FULL (flux engines)."""
        self._call("fix_routes", layers)

    def mix_rows(self, sparse_rows: int) -> None:
        """Make so many of the running requests SPARSE in all layers (flux engines)."""
        self._call("mix_rows", sparse_rows)

    def call_worker(self, method: str) -> Any:
        """Call a method without arguments on the worker."""
        return self._call("call_worker", method)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        """End the process, and vLLM's with it."""
        self._pipe.close()
        self._process.join(timeout=60)
        if self._process.is_alive():
            self._process.terminate()

    def _call(self, name: str, *args: Any) -> Any:
        self.wait()
        self._pipe.send((name, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, value = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError("the engine's process ended; its log says why") from error
        if not good:
            raise RuntimeError(f"the engine failed: {value}")
        return value


def _serve(pipe: Connection, vocab_size: int, arguments: dict[str, Any]) -> None:
    """Load the engine, say so, and do what the pipe asks for until it is closed."""
    # vLLM's EngineCore in this process: in one of its own it would go on decoding between steps
    # that are asked for, beside the engine that is measured.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        driver = EngineDriver(vocab_size, arguments)
    except Exception as error:
        pipe.send((False, repr(error)))
        raise
    pipe.send((True, None))
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(driver, name)(*args)))
        except Exception as error:
            pipe.send((False, repr(error)))
            raise
