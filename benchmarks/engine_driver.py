"""A `vllm.LLM` in this process, driven step by step, with a watch."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import prompt_load
from benchmarks.host_times import HostTimer
from benchmarks.queue_load import QueueLoad


class EngineDriver:
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
