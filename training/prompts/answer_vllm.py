"""Answers by stock vLLM, offline."""

import importlib
import os
from typing import Any

from training.prompts.answerer import Answer, AnswerSettings, Asked


class VllmAnswerer:
    """vLLM's `LLM` with its own attention backend.

    Training builds on nothing of vLLM: it is asked here as a program, and imported by name.

    Args:
        settings: model, limits, sampling.
    """

    def __init__(self, settings: AnswerSettings) -> None:
        # No plugin is loaded: answers are those of vLLM as it comes.
        os.environ["VLLM_PLUGINS"] = ""
        self._vllm: Any = importlib.import_module("vllm")
        limits = {"max_model_len": settings.max_model_len} if settings.max_model_len else {}
        self._llm = self._vllm.LLM(
            model=settings.model,
            gpu_memory_utilization=settings.gpu_memory,
            max_num_batched_tokens=settings.batch_tokens,
            seed=settings.seed,
            **limits,
        )
        self.tokenizer: Any = self._llm.get_tokenizer()
        self.max_model_len: int = self._llm.llm_engine.model_config.max_model_len
        self._temperature = settings.temperature

    def answer(self, asked: list[Asked]) -> list[Answer]:
        """Answer prompts, as many at a time as fit."""
        # Seeds of single requests would make vLLM sample row by row; the engine's own is enough.
        sampling = [
            self._vllm.SamplingParams(
                temperature=self._temperature,
                top_p=0.95 if self._temperature else 1.0,
                max_tokens=one.max_new_tokens,
            )
            for one in asked
        ]
        prompts = [{"prompt_token_ids": one.token_ids} for one in asked]
        outputs = self._llm.generate(prompts, sampling)
        return [
            Answer(output.outputs[0].text, list(output.outputs[0].token_ids)) for output in outputs
        ]
