"""Tiny random models, a tokenizer that needs no file, and a small corpus."""

import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from training.data.text import Document, write_corpus

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCABULARY = 256


class WordTokenizer:
    """One token a word, by a checksum; a chat template of two lines a turn."""

    chat_template = "two lines"

    def __call__(self, texts: str | list[str], **options: object) -> dict[str, list[Any]]:
        def number(word: str) -> int:
            return 1 + zlib.crc32(word.encode()) % (VOCABULARY - 1)

        if isinstance(texts, str):
            return {"input_ids": [number(word) for word in texts.split()]}
        return {"input_ids": [[number(word) for word in text.split()] for text in texts]}

    def apply_chat_template(self, turns: list[dict[str, str]], **options: object) -> str:
        said = "".join(f"[{turn['role']}]\n{turn['content']}\n" for turn in turns)
        return said + "[assistant]\n"


def make_model(family: str = "llama", layers: int = 4, **config: Any) -> Any:
    """Make a random model whose attention prefers few keys, so that hiding keys matters."""
    config_type, model_type = FAMILIES[family]
    arguments = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    } | config
    model = model_type(config_type(**arguments)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 1.5 * weight.shape[1] ** -0.5, generator=generator)
            elif "norm" not in name:
                weight.normal_(0.0, 0.1, generator=generator)
    return model


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    return make_model


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write invented prose and code of several sources, enough for every split."""
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("n", "r", "st", "lo")]
    documents = []
    for number in range(120):
        sentences = [
            " ".join(rng.choices(words, k=rng.randint(6, 14))).capitalize() + "." for _ in range(90)
        ]
        prose = "\n\n".join(" ".join(sentences[at : at + 5]) for at in range(0, 90, 5))
        documents.append(Document(f"source {number % 3}", "prose", prose))
        code = "\n".join(f"{rng.choice(words)} = {rng.choice(words)}({at})" for at in range(80))
        documents.append(Document("code", "code", code))
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl.gz"
    write_corpus(path, documents)
    return path
