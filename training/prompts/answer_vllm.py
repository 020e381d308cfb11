"""Answers by stock vLLM, offline."""

import importlib
import os
from typing import Any

from training.prompts.answerer import Answer, AnswerSettings, Asked

_FREE_SHARE = 0.05
"""Of the memory, free at the start, where nothing is measured."""


def engine_arguments(settings: AnswerSettings) -> dict[str, Any]:
    """Return what vLLM's `LLM` is made with."""
    arguments = {
        "model": settings.model,
        "gpu_memory_utilization": settings.gpu_memory,
        "max_num_batched_tokens": settings.batch_tokens,
        "seed": settings.seed,
    }
    if settings.max_model_len:
        arguments["max_model_len"] = settings.max_model_len
    if settings.kv_gib:
        arguments["kv_cache_memory_bytes"] = int(settings.kv_gib * 2**30)
        arguments["gpu_memory_utilization"] = _FREE_SHARE
    return arguments


class VllmAnswerer:
    """vLLM's `LLM` with its own attention backend.

    Training builds on nothing of vLLM: it is asked here as a program, and imported by name.

    Args:
        settings: model, limits, seed.

    Raises: ValueError: vLLM does not start.
    """

    def __init__(self, settings: AnswerSettings) -> None:
        # No plugin is loaded: answers are those of vLLM as it comes.
        os.environ["VLLM_PLUGINS"] = ""
        self._vllm: Any = importlib.import_module("vllm")
        try:
            self._llm = self._vllm.LLM(**engine_arguments(settings))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"expected vLLM to start, found: {error}. Where memory is short, see --kv_gib and "
                "--gpu_memory, or answer with --engine transformers"
            ) from error
        self.tokenizer: Any = self._llm.get_tokenizer()
        self.max_model_len: int = self._llm.llm_engine.model_config.max_model_len

    def answer(self, asked: list[Asked]) -> list[Answer]:
        """Answer prompts, as many at a time as fit."""
        # Seeds of single requests would make vLLM sample row by row; the engine's own is enough.
        sampling = [
            self._vllm.SamplingParams(
                temperature=one.temperature,
                top_p=0.95 if one.temperature else 1.0,
                max_tokens=one.max_new_tokens,
            )
            for one in asked
        ]
        prompts = [{"prompt_token_ids": one.token_ids} for one in asked]
        outputs = self._llm.generate(prompts, sampling)
        return [
            Answer(output.outputs[0].text, list(output.outputs[0].token_ids)) for output in outputs
        ]

    def close(self) -> None:
        """End the engine's processes, for which a process that `multiprocessing` made waits."""
        self._llm.llm_engine.engine_core.shutdown()
