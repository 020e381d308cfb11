"""A real vLLM engine inside the test's process, with a log of what its scheduler did.

The log comes from vLLM's scheduler, not from flux: a test replays it in the reference.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch

from tests.helpers.engine_process import no_freezing, prepare_process

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass
class Answer:
    """What the engine gave for one request.

    Attributes:
        prompt: token ids.
        tokens: output token ids.
        logprobs: of each output token.
        candidates: for each output token, the log-probabilities of the likeliest ones by id.
        prompt_logprobs: of each prompt token given those before it, None for the first; empty
            where they were not asked for.
        cached_tokens: prompt tokens found in the prefix cache.
        steps: (first position, tokens, phase) of each step the scheduler gave the request; of a
            decode step, the tokens that stood once its drafts were verified.
        preemptions: times it lost its KV blocks.
        routes: per layer, as decided; None without flux, and where none had to be.
        p_full: per layer, likewise.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    candidates: list[dict[int, float]]
    prompt_logprobs: list[float | None]
    cached_tokens: int
    steps: list[tuple[int, int, str]] = field(default_factory=list)
    preemptions: int = 0
    routes: list[int] | None = None
    p_full: list[float] | None = None

    @property
    def resumed_at(self) -> list[int]:
        """First positions of the steps that went back: 0, or what the prefix cache still held."""
        return [
            start
            for (before, length, _), (start, _, _) in pairwise(self.steps)
            if start < before + length
        ]


class Engine:
    """`vllm.LLM` on token ids, eager, in float32 and a tenth of a GPU unless told otherwise.

    Args:
        model: folder.
        flux: the flux configuration; None serves with vLLM's own CPU_ATTN.
        arguments: further arguments of `vllm.LLM`.
    """

    _open: ClassVar[int] = 0

    def __init__(self, model: Path, flux: dict[str, Any] | None, **arguments: Any) -> None:
        from vllm import LLM

        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": 4096,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": 64 << 20,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
        }
        if torch.cuda.is_available():  # several processes share the GPU
            defaults["gpu_memory_utilization"] = 0.1
        if flux is not None:
            defaults |= {"attention_backend": "flux", "additional_config": {"flux": flux}}
        self.has_flux = flux is not None
        prepare_process()
        if Engine._open == 0:
            gc.collect()
            gc.freeze()  # what is left was imported; vLLM collects garbage eight times an engine
        try:
            with no_freezing():
                self.llm = LLM(model=str(model), **(defaults | arguments))
        except BaseException:
            self._forget()
            raise
        Engine._open += 1
        self.core = self.llm.llm_engine.engine_core.engine_core
        self._steps: dict[str, list[tuple[int, int, str]]] = {}
        self._step_of: dict[tuple[int, str], int] = {}
        self._preemptions: dict[str, int] = {}
        self._most_step_tokens = self.core.scheduler.max_num_scheduled_tokens
        self._log_scheduler()

    def _log_scheduler(self) -> None:
        scheduler = self.core.scheduler
        schedule, update = scheduler.schedule, scheduler.update_from_output

        counts = scheduler.get_request_counts

        def one_more() -> tuple[int, int]:
            """Let no request be the only one: vLLM would compute it in whole steps."""
            running, waiting = counts()
            return running + 1, waiting

        def logged(*args: Any, **kwargs: Any) -> Any:
            with patch.object(scheduler, "get_request_counts", one_more):
                output = schedule(*args, **kwargs)
            most = scheduler.scheduler_config.long_prefill_token_threshold
            assert not 0 < most < max(output.num_scheduled_tokens.values(), default=0), output
            starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
            cached = output.scheduled_cached_reqs
            starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            for request_id, start in starts.items():
                request = scheduler.requests[request_id]
                # Every token before the newest one was computed before: computing it anew, as
                # any prompt token, is prefill.
                past = start < max(request.num_prompt_tokens, request.num_tokens - 1)
                phase = "prefill" if past else "decode"
                step = (start, output.num_scheduled_tokens[request_id], phase)
                steps = self._steps.setdefault(request_id, [])
                self._step_of[id(output), request_id] = len(steps)
                steps.append(step)
            for request_id in output.preempted_req_ids or ():
                self._preemptions[request_id] = self._preemptions.get(request_id, 0) + 1
            return output

        def updated(output: Any, results: Any) -> Any:
            names = [name for name in output.num_scheduled_tokens if name in scheduler.requests]
            requests = {name: scheduler.requests[name] for name in names}
            known = {name: request.num_tokens for name, request in requests.items()}
            returned = update(output, results)
            for name, request in requests.items():
                self._note_accepted(name, output, known[name], request.num_tokens)
            return returned

        scheduler.schedule, scheduler.update_from_output = logged, updated

    def _note_accepted(self, name: str, output: Any, known: int, now_known: int) -> None:
        """Correct a decode step: when it was scheduled, all drafts counted as accepted."""
        index = self._step_of.pop((id(output), name), None)
        if index is None:
            return  # in flight since an earlier call
        if self._steps[name][index][2] == "decode" and now_known > known:
            self._steps[name][index] = (known - 1, now_known - known, "decode")

    @property
    def worker(self) -> Any:
        """The only worker, in this process."""
        return self.core.model_executor.driver_worker.worker

    @property
    def runtime(self) -> Any:
        """Flux's runtime in the worker."""
        return self.worker.flux_status.__self__

    def limit_chunks(self, tokens: int) -> None:
        """Cut prompts into chunks of at most so many tokens from now on; 0: whole."""
        self.core.scheduler.scheduler_config.long_prefill_token_threshold = tokens

    def limit_steps(self, tokens: int) -> None:
        """Schedule at most so many tokens a step from now on, of all requests together."""
        self.core.scheduler.max_num_scheduled_tokens = tokens

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.reset_prefix_cache()

    def reset(self) -> None:
        """Undo the limits and empty the prefix cache, for another test."""
        self.limit_chunks(0)
        self.limit_steps(self._most_step_tokens)
        self.forget_prefixes()

    @contextmanager
    def few_blocks(self, blocks: int) -> Iterator[None]:
        """Leave so many KV blocks, found in no prefix cache; the others are taken meanwhile."""
        self.forget_prefixes()
        pool = self.core.scheduler.kv_cache_manager.block_pool
        taken = pool.get_new_blocks(pool.get_num_free_blocks() - blocks)
        try:
            yield
        finally:
            pool.free_blocks(taken)

    def probe(self, tokens: Sequence[int]) -> tuple[Any, Any, Any]:
        """Probe a prompt without a request.

        Returns: pooled queries before RoPE [layers, pools, H], P(FULL) [layers], routes [layers],
            all on the host, as what they are compared with.
        """
        from flux_vllm.routing.prompts import Prompt

        probe = self.runtime.probe
        probe.decide(Prompt("probed by a test", len(tokens), list(tokens)))
        pooled = probe._inputs.complete(probe._weights @ probe._mean_query, probe._told)
        return pooled.cpu(), probe.full_probability.clone().cpu(), probe.routes.clone().cpu()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        prompt_logprobs: bool = False,
        candidates: int = 0,
        adapter: Any = None,
        **sampling: Any,
    ) -> list[Answer]:
        """Answer prompts together, greedily, through a LoRA adapter (LoRARequest) or without."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=candidates,
            prompt_logprobs=0 if prompt_logprobs else None,
            **sampling,
        )
        self._steps.clear()
        self._step_of.clear()
        self._preemptions.clear()
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            parameters,
            use_tqdm=False,
            lora_request=adapter,
        )
        if self.has_flux:
            self.runtime.status()  # the decisions of steps in flight
        return [self._answer(output) for output in outputs]

    def _answer(self, output: Any) -> Answer:
        completion = output.outputs[0]
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        prompt_pairs = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
        # The scheduler's ids are the caller's with a suffix.
        names = [n for n in self._steps if n.rsplit("-", 1)[0] == output.request_id]
        assert len(names) == 1, (output.request_id, list(self._steps))
        answer = Answer(
            prompt=list(output.prompt_token_ids),
            tokens=list(completion.token_ids),
            logprobs=[row[token].logprob for token, row in pairs],
            candidates=[
                {token: entry.logprob for token, entry in row.items()}
                for row in completion.logprobs
            ],
            prompt_logprobs=[row and row[token].logprob for token, row in prompt_pairs],
            cached_tokens=output.num_cached_tokens or 0,
            steps=self._steps[names[0]],
            preemptions=self._preemptions.get(names[0], 0),
        )
        if self.has_flux:
            for decision in self.runtime.recent:
                if decision.request_id == names[0]:
                    answer.routes = decision.routes
                    answer.p_full = decision.full_probability
        return answer

    def close(self) -> None:
        """Take the engine down, so that another can start in this process."""
        with no_freezing():
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core
        Engine._open -= 1
        self._forget()

    @classmethod
    def _forget(cls) -> None:
        """Undo what engines set up in this process, one that did not start too.

        All of them share it, so it stays for those that are open.
        """
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if cls._open == 0:
            with no_freezing():
                cleanup_dist_env_and_memory()  # collects garbage too
        else:
            gc.collect()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
