"""Answers by transformers, one prompt at a time; for machines without vLLM."""

from typing import Any

import torch
from transformers import AutoTokenizer

from training.language_model import load_language_model
from training.prompts.answerer import Answer, AnswerSettings, Asked


class TransformersAnswerer:
    """A causal language model and its tokenizer.

    Args:
        settings: model, device, seed.
    """

    def __init__(self, settings: AnswerSettings) -> None:
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device != "cpu" else torch.float32
        self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
        self._model: Any = load_language_model(settings.model, dtype)
        self._model.to(device).eval()
        limit = self._model.config.get_text_config().max_position_embeddings
        self.max_model_len: int = settings.max_model_len or limit
        self._seed = settings.seed

    @torch.inference_mode()
    def answer(self, asked: list[Asked]) -> list[Answer]:
        """Answer prompts, one after the other."""
        return [self._one(one, number) for number, one in enumerate(asked)]

    def close(self) -> None:
        """Nothing was started."""

    def _one(self, asked: Asked, number: int) -> Answer:
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if asked.temperature:
            torch.manual_seed(self._seed + number)
            sampling = {"do_sample": True, "temperature": asked.temperature, "top_p": 0.95}
        prompt = torch.tensor([asked.token_ids], device=self._model.device)
        produced = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=asked.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            top_k=None,
            repetition_penalty=1.0,
            **sampling,
        )[0, prompt.shape[1] :].tolist()
        return Answer(self.tokenizer.decode(produced, skip_special_tokens=True), produced)
