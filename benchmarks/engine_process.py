"""A `vllm.LLM` driven step by step, in a process of its own: several load and live side by side."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import prompt_load
from benchmarks.host_times import HostTimer
from benchmarks.queue_load import QueueLoad


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
        driver = _Driver(vocab_size, arguments)
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


class _Driver:
    """The engine's end: one `vllm.LLM`."""

    def __init__(self, vocab_size: int, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._vocab_size = vocab_size
        self._next = 0
        defaults = {
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "worker_extension_cls": "benchmarks.worker_extension.BenchmarkWorker",
        }
        self._llm = LLM(**(defaults | arguments))
        self._core = self._llm.llm_engine

    def settings(self) -> dict[str, Any]:
        config = self._core.vllm_config
        scheduler, cache = config.scheduler_config, config.cache_config
        step = scheduler.max_num_batched_tokens
        return {
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": step,
            # The most tokens of one prompt in a step.
            "chunk": min(step, scheduler.long_prefill_token_threshold or step),
            "kv_gib": (cache.kv_cache_memory_bytes or 0) / 2**30 or None,  # None: vLLM measured it
            "max_model_len": config.model_config.max_model_len,
            "block_size": cache.block_size,
            "enforce_eager": config.model_config.enforce_eager,
            "async_scheduling": scheduler.async_scheduling,
        }

    def fix_routes(self, layers: Sequence[int] | None) -> None:
        self._llm.collective_rpc("flux_fix_routes", args=(layers,))

    def mix_rows(self, sparse_rows: int) -> None:
        self._llm.collective_rpc("mix_rows", args=(sparse_rows,))

    def call_worker(self, method: str) -> Any:
        return self._llm.collective_rpc(method)[0]

    def peak_memory(self) -> tuple[int, int] | None:
        return self.call_worker("peak_memory")

    def prefill_seconds(self, tokens: int, times: int) -> float:
        seconds = []
        self.call_worker("forget_peak_memory")
        for _ in range(times):
            prompt = self._random_prompt(tokens)
            begin = time.perf_counter()
            self._llm.generate([{"prompt_token_ids": prompt}], _sampling(1), use_tqdm=False)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    def profile(self, tokens: int) -> list[tuple[str, int, float]]:
        return _kernels(partial(self.prefill_seconds, tokens, 1))

    def profile_steps(self, steps: int, batch: int) -> list[tuple[str, int, float]]:
        return _kernels(partial(self.step_seconds, steps, batch))

    def _random_prompt(self, tokens: int) -> list[int]:
        self._next += 1
        generator = torch.Generator().manual_seed(self._next)
        return torch.randint(1, self._vocab_size, (tokens,), generator=generator).tolist()

    def start(self, context: int, batch: int, attend: bool) -> list[str]:
        if not attend:
            self._llm.collective_rpc("skip_attention", args=(True,))
        names = []
        for _ in range(batch):
            prompt = {"prompt_token_ids": self._random_prompt(context)}
            # Aborted by this name, not by the longer one that the engine gives it.
            names.append(f"decode-{self._next}")
            self._core.add_request(names[-1], prompt, _sampling(4096))
        decoding: set[str] = set()
        while len(decoding) < batch:
            decoding |= {output.request_id for output in self._core.step()}
        if not attend:
            self._llm.collective_rpc("skip_attention", args=(False,))
        for _ in range(16):
            self._core.step()
        return names

    def step_seconds(self, steps: int, batch: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            outputs = self._core.step()
            if len(outputs) != batch:
                raise RuntimeError(f"expected {batch} rows to decode, found {len(outputs)}")
        seconds = (time.perf_counter() - begin) / steps
        self._finish_steps_in_flight()
        return seconds

    def _finish_steps_in_flight(self) -> None:
        """Leave the GPU to the engine that is timed next."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def mixed_seconds(self, tokens: int, batch: int, times: int) -> list[float]:
        seconds = []
        for _ in range(times):
            name = f"mixed-{self._next}"
            prompt = {"prompt_token_ids": self._random_prompt(tokens)}
            begin = time.perf_counter()
            self._core.add_request(name, prompt, _sampling(1))
            while all(output.request_id != name for output in self._core.step()):
                pass
            seconds.append(time.perf_counter() - begin)
            for _ in range(4):  # back to steps of decode rows alone
                self._core.step()
        self._finish_steps_in_flight()
        return seconds

    def set_sparse_share(self, share: float, tokens: int) -> float:
        set_threshold = partial(self._llm.collective_rpc, "flux_set_threshold")
        set_threshold(args=(0.5,))
        self.prefill_seconds(tokens, 1)
        decision = self.call_worker("flux_status")["recent"][-1]
        p_full = sorted(p for p in decision["full_probability"] if p == p)
        count = round(share * len(p_full))
        above = p_full[count] if count < len(p_full) else 1.0
        set_threshold(args=((p_full[count - 1] + above) / 2 if count else 0.0,))
        self.prefill_seconds(tokens, 1)
        routes = self.call_worker("flux_status")["recent"][-1]["routes"]
        return routes.count(0) / len(p_full)

    def answer_queue(self, context: int, tokens: int, seconds: float) -> dict[str, float]:
        names: list[str] = []

        def add() -> None:
            prompt = {"prompt_token_ids": self._random_prompt(context)}
            names.append(f"queue-{self._next}")
            self._core.add_request(names[-1], prompt, _sampling(tokens))

        try:
            return QueueLoad(self._core, self._scheduler, add).run(seconds)
        finally:
            self.stop(names)

    @property
    def _scheduler(self) -> Any:
        return self._core.engine_core.engine_core.scheduler

    def answer_prompts(
        self, prompts: Sequence[Sequence[int]], tokens: int, stop_ids: Sequence[int]
    ) -> dict[str, Any]:
        sampling = _sampling(tokens, stop_token_ids=list(stop_ids))
        found = prompt_load.answer_prompts(self._core, self._scheduler, prompts, sampling)
        recent = self.call_worker("flux_status")["recent"]
        return found | {"routes": [decision["routes"] for decision in recent]}

    def soak(self, prompts: Sequence[Sequence[int]], requests: int, seed: int) -> dict[str, int]:
        return prompt_load.soak(self._core, self._scheduler, prompts, requests, seed, _sampling)

    def host_times(self, steps: int, batch: int) -> dict[str, float]:
        from vllm.v1.core.sched.scheduler import Scheduler

        timer = HostTimer()
        for name in ("schedule", "update_from_output"):
            timer.time(Scheduler, name)
        self.call_worker("begin_host_times")
        self.step_seconds(steps, batch)
        totals = self.call_worker("end_host_times") | timer.totals
        timer.stop()
        return {name: 1e6 * seconds / steps for name, (_, seconds) in totals.items()}

    def stop(self, names: Sequence[str]) -> None:
        self._core.abort_request(list(names))
        while self._core.has_unfinished_requests():
            self._core.step()


def _kernels(work: Callable[[], object]) -> list[tuple[str, int, float]]:
    """List what runs on the GPU meanwhile: name, calls, total milliseconds; longest first."""
    kind = torch.profiler.ProfilerActivity
    activity = kind.CUDA if torch.cuda.is_available() else kind.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # steps in flight
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [(e.key, e.count, e.self_device_time_total / 1000) for e in events]


def _sampling(tokens: int, **others: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **others
    )
