"""What answers prompts: its settings, what it is given, and what it gives back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Engine = Literal["auto", "vllm", "transformers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """How prompts are answered."""

    model: str
    """Folder or name of the model."""
    prompts: Path
    """JSON lines of `id` and `messages` or `prompt`."""
    out: Path
    """The same lines with `answer` and `answer_ids`; lines that are there are not asked again."""
    max_new_tokens: int = 0
    """Most tokens of every answer; 0: as each line's `max_new_tokens` says, 128 without it."""
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0
    """Of sampling."""
    max_model_len: int = 0
    """Most tokens of prompt and answer together, longer prompts lose their middle; 0: the model's
    limit."""
    engine: Engine = "auto"
    """auto: vLLM where it is installed, else transformers."""
    device: str = "auto"
    """Of transformers: `cpu`, `cuda`, or auto."""
    batch: int = 1024
    """Prompts handed over at once; their answers are written together."""
    gpu_memory: float = 0.9
    """Share of the memory that vLLM takes, of a GPU that nothing else uses."""
    kv_gib: float = 0.0
    """GiB of vLLM's KV cache, in place of that share: beside other processes, whose memory vLLM
    takes for its own."""
    batch_tokens: int = 16384
    """Most tokens that vLLM computes in a step."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt as tokens."""

    token_ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote."""

    text: str
    token_ids: list[int]
    """The end-of-turn token included, where the model ended its turn."""


class Answerer(Protocol):
    """An engine with a model loaded."""

    tokenizer: Any
    max_model_len: int
    """Most tokens of prompt and answer together."""

    def answer(self, asked: list[Asked]) -> list[Answer]:
        """Answer prompts."""

    def close(self) -> None:
        """End what it started."""
