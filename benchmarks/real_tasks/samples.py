"""Samples as they are asked: read from files, put into the chat template, cut in the middle."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_tasks.metrics import score


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question."""

    task: str
    id: str
    prompt: str
    """The user's turn, or the text to go on with."""
    answers: tuple[str, ...] = ()
    max_new_tokens: int
    min_new_tokens: int = 0
    chat: bool = True
    """Whether the prompt goes into the model's chat template."""
    messages: tuple[dict[str, Any], ...] = ()
    """A conversation of several turns, instead of `prompt`."""

    def score(self, text: str) -> float | None:
        """Score an answer by the task's metric; None where there is no right answer."""
        return score(self.task, text, self.answers, self.prompt)


@dataclass(frozen=True, slots=True)
class Asked:
    """A sample in the model's tokens."""

    sample: Sample
    token_ids: list[int]
    cut_tokens: int
    """Taken out of the prompt's middle."""


def read_samples(path: Path, new_tokens: int = 0) -> list[Sample]:
    """Read a JSON Lines file of samples.

    Args:
        path: lines with `prompt` or `messages`; `task`, `id`, `answers`, `max_new_tokens` and
            `chat` where they are known.
        new_tokens: of an answer where the line does not say.

    Raises: ValueError: a line has no prompt, or does not say how long the answer may be.
    """
    found = []
    for number, line in enumerate(path.read_text().strip("\n").split("\n"), 1):
        entry = json.loads(line)
        tokens = entry.get("max_new_tokens", new_tokens)
        if not (entry.get("prompt") or entry.get("messages")) or tokens < 1:
            raise ValueError(
                f"{path}:{number}: expected `prompt` or `messages`, and `max_new_tokens` of at "
                f"least 1, found {sorted(entry)}; correct the line"
            )
        found.append(
            Sample(
                task=entry.get("task", path.stem),
                id=entry.get("id", f"{path.stem}-{number}"),
                prompt=entry.get("prompt", ""),
                messages=tuple(entry.get("messages", ())),
                answers=tuple(entry.get("answers", ())),
                max_new_tokens=tokens,
                chat=entry.get("chat", True),
            )
        )
    return found


class Encoder:
    """Turns samples into the model's tokens.

    Args:
        tokenizer: of transformers.
        max_model_len: tokens of prompt and answer together.
        template_options: of the chat template, such as {"enable_thinking": False}.
    """

    def __init__(
        self, tokenizer: Any, max_model_len: int, template_options: dict[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._options = template_options or {}

    def encode(self, sample: Sample) -> Asked:
        """Encode a sample; what is too long loses the middle of its longest turn.

        Raises: ValueError: not even the template and the answer fit.
        """
        turns = list(sample.messages) or [{"role": "user", "content": sample.prompt}]
        longest = max(range(len(turns)), key=lambda turn: len(turns[turn]["content"]))
        content = turns[longest]["content"]
        content_ids = self._tokens(content, special=False)
        limit = self._max_model_len - sample.max_new_tokens
        token_ids = self._wrap(turns, sample.chat)
        kept = len(content_ids)
        while len(token_ids) > limit:
            # Halves are joined as text, whose tokens may be a few more.
            kept -= len(token_ids) - limit
            if kept < 2:
                raise ValueError(
                    f"{sample.id}: expected a prompt and {sample.max_new_tokens} new tokens to fit "
                    f"{self._max_model_len} tokens, found no room; raise --max-model-len"
                )
            halves = content_ids[: kept // 2], content_ids[-(kept // 2) :]
            turns[longest] = turns[longest] | {
                "content": "".join(
                    self._tokenizer.decode(half, skip_special_tokens=True) for half in halves
                )
            }
            token_ids = self._wrap(turns, sample.chat)
        return Asked(sample, token_ids, len(content_ids) - kept)

    def text_tokens(self, text: str) -> list[int]:
        """Encode plain text, without special tokens."""
        return self._tokens(text, special=False)

    def _wrap(self, turns: Sequence[dict[str, Any]], chat: bool) -> list[int]:
        if not chat:
            return self._tokens(turns[0]["content"], special=True)
        text = self._tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=True, **self._options
        )
        return self._tokens(text, special=False)

    def _tokens(self, text: str, special: bool) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return tokens


def digest(asked: Sequence[Asked]) -> str:
    """Return what tells prompts apart: of their tokens, and of how long answers may be."""
    text = json.dumps(
        [[one.token_ids, one.sample.max_new_tokens, one.sample.min_new_tokens] for one in asked]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
