"""Tiny random models, their trainers, a tokenizer that needs no file, and a small corpus."""

import random
import zlib
from collections.abc import Callable
from functools import partial
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

from tests.unit.training.runs import CALIBRATION_PROMPTS, CPU, SINK, WINDOW
from training import trainer as trainer_module
from training.attach import RoutedModel
from training.config import (
    DataSettings,
    LossSettings,
    OptimizerSettings,
    RouterSettings,
    SystemSettings,
    TrainConfig,
)
from training.data.stream import PromptStream
from training.data.text import Document, write_corpus
from training.distributed import World, shard_model
from training.trainer import Trainer

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


def build_trainer(
    folder: Path,
    corpus: Path,
    name: str = "run",
    steps: int = 60,
    world: World = CPU,
    stream: Any = None,
    router: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    layers: int = 4,
    **loss: Any,
) -> Trainer:
    """Make a trainer of a tiny model, whose run is `folder / name`; without a test's fixtures."""
    sizes: dict[str, Any] = {
        "probe": (8, 16),
        "pools": ("tail:4", "head:8"),
        "context_depths": (1.0,),
        "widths": (16, 16, 16, 16),
        "sink_tokens": SINK,
        "window_tokens": WINDOW,
        "sparse_pattern": "streaming",
        "full_bias": 1.0,
    }
    config = TrainConfig(
        model="tiny",
        out=str(folder / name),
        router=RouterSettings(**sizes | (router or {})),
        data=DataSettings(
            tasks=("needle", "repeat_end"),
            corpus=str(corpus),
            min_tokens=256,
            max_tokens=300,
            max_answer_tokens=8,
            workers=0,
        ),
        loss=LossSettings(**{"multiplier_rate": 0.3} | loss),
        optimizer=OptimizerSettings(
            **{"steps": steps, "batch_size": 4, "learning_rate": 5e-3} | (optimizer or {})
        ),
        system=SystemSettings(device="cpu", dtype="float32", save_every=10),
    )
    stream = stream or PromptStream(config.data, WordTokenizer(), "train", config.seed)
    model = make_model(layers=layers).requires_grad_(False)
    shard_model(model, world)
    return Trainer(config, RoutedModel(model, SINK, WINDOW), stream, world)


@pytest.fixture
def make_trainer(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Trainer]:
    """Give a maker of trainers of a tiny model; each run has a folder by its name."""
    monkeypatch.setattr(trainer_module, "_CALIBRATION_PROMPTS", CALIBRATION_PROMPTS)
    return partial(build_trainer, tmp_path, corpus)
