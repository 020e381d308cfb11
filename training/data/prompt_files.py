"""Prompts from files, with the model's own answers: what people sent, in their own mix.

A line is `messages` (the model's chat template goes around them) or `prompt` (taken as it is), with
`answer`, the text, or `answer_ids`, its tokens, as `python -m training answers` writes them. Other
fields are passed over, but for `task`, which the paper's objective goes by.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from training.config import DataSettings
from training.data.encoding import Encoded
from training.data.text import Split
from training.prompts.jsonl import read_numbered_lines

_SHOWN_TOKENS = 8
_NO_TASK = "prompt"


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """One line of a file."""

    messages: tuple[dict[str, Any], ...]
    """Turns of a chat, without the answer; empty for a plain prompt."""
    prompt: str
    answer: str
    answer_ids: tuple[int, ...]
    """Of the answer as the model wrote it; empty where only its text is known."""
    task: str = _NO_TASK

    @property
    def split(self) -> Split:
        """One prompt in ten is for validation, one for tests, by a hash of what is asked."""
        text = self.prompt or json.dumps(self.messages, sort_keys=True)
        bucket = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 10
        return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


class FilePrompts(Dataset[Encoded]):
    """The prompts of one split, in an order that the seed and the pass over them decide.

    Args:
        settings: files, and the lengths they are cut to.
        tokenizer: the model's.
        split: which prompts.
        seed: of the order.
        max_model_tokens: the model's limit, prompt and answer.

    Raises: ValueError: a line that is no prompt with an answer, or no line in the split.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Any,
        split: Split,
        seed: int,
        max_model_tokens: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.limit = min(max_model_tokens, settings.max_tokens + settings.max_answer_tokens)
        self.max_answer_tokens = settings.max_answer_tokens
        rows = read_prompt_files(Path(file) for file in settings.files)
        self.prompts = [prompt for prompt in rows if prompt.split == split]
        if not self.prompts:
            raise ValueError(
                f"expected prompts of the {split} split (by a hash of each, 8 of 10 are for "
                f"training) in {', '.join(settings.files)}, found none; give more prompts"
            )

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks that the files tell apart."""
        return sorted({prompt.task for prompt in self.prompts})

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Encoded:
        """Return prompt `index` of an endless stream: pass after pass, each in another order."""
        turn, place = divmod(index, len(self.prompts))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.prompts))
        return encode_prompt(
            self.prompts[order[place]], self.tokenizer, self.limit, self.max_answer_tokens
        )

    def sample(self, count: int) -> list[Encoded]:
        """Return at most so many prompts, evenly spaced in the files' order."""
        places = np.linspace(0, len(self.prompts) - 1, min(count, len(self.prompts)))
        return [
            encode_prompt(self.prompts[at], self.tokenizer, self.limit, self.max_answer_tokens)
            for at in places.round().astype(int)
        ]


def encode_prompt(
    prompt: FilePrompt, tokenizer: Any, max_tokens: int, max_answer_tokens: int
) -> Encoded:
    """Tokenize a prompt and its answer.

    Args:
        prompt: of a file.
        tokenizer: the model's, from transformers.
        max_tokens: of both; a longer prompt loses its middle.
        max_answer_tokens: the answer is cut to this many.

    Returns: Encoded.
    Raises: ValueError: the answer's tokens are another tokenizer's.
    """
    answer = list(prompt.answer_ids)
    if answer:
        _check_tokens(answer, prompt.answer, tokenizer)
    if not answer:
        answer = tokenizer(prompt.answer, add_special_tokens=False, verbose=False)["input_ids"]
    answer = answer[:max_answer_tokens]
    ids = prompt_ids(prompt.messages, prompt.prompt, tokenizer, max_tokens - len(answer))
    return Encoded(
        task=prompt.task,
        token_ids=np.array([*ids, *answer], dtype=np.int32),
        prompt_len=len(ids),
        shared_len=0,
    )


def _check_tokens(token_ids: list[int], text: str, tokenizer: Any) -> None:
    """Hold the first tokens against the text; a cut character or spaces do not count."""
    known = len(tokenizer)
    shown = token_ids[:_SHOWN_TOKENS]
    said = "".join(
        tokenizer.decode([at for at in shown if at < known], skip_special_tokens=True).split()
    )
    agrees = not text or "".join(text.split()).startswith(said.rstrip("\ufffd"))
    if max(token_ids) >= known or not agrees:
        raise ValueError(
            f"expected answer_ids of this model's tokenizer, which say {text[:40]!r}, found tokens "
            f"that say {said[:40]!r}; answers are those of the model that is trained: make them "
            "with `python -m training answers --model` and the same model"
        )


def prompt_ids(
    messages: Iterable[dict[str, Any]], prompt: str, tokenizer: Any, max_tokens: int
) -> list[int]:
    """Tokenize messages through the chat template, or a plain prompt, and cut its middle.

    Args:
        messages: turns of a chat; empty for a plain prompt.
        prompt: the plain prompt.
        tokenizer: the model's, from transformers.
        max_tokens: most tokens to return.

    Returns: token ids, as a server makes them.
    """
    turns = list(messages)
    if turns:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    if len(ids) > max_tokens:
        head = max_tokens // 2
        ids = ids[:head] + ids[len(ids) - (max_tokens - head) :]
    return list(ids)


def read_prompt_files(paths: Iterable[Path]) -> list[FilePrompt]:
    """Read prompts with their answers from JSONL files.

    Raises: ValueError: a line that is no JSON object, or without the fields.
    """
    return [
        _prompt(row, f"{path}, line {number}")
        for path in paths
        for number, row in read_numbered_lines(path)
    ]


def _prompt(row: dict[str, Any], where: str) -> FilePrompt:
    messages, prompt = row.get("messages") or [], row.get("prompt") or ""
    answer, ids = row.get("answer") or "", row.get("answer_ids") or []
    turns = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str | list) for turn in messages
    )
    if not turns or not all(isinstance(token, int) for token in ids):
        raise ValueError(
            f"{where}: expected `messages` as a list of objects with `role` and `content`, and "
            f"`answer_ids` as a list of numbers, found {str(messages)[:60]!r} and "
            f"{str(ids)[:40]!r}; correct the line"
        )
    if messages and messages[-1].get("role") == "assistant" and not (answer or ids):
        *messages, last = messages
        answer = last["content"]
    if bool(messages) == bool(prompt) or not (answer or ids):
        raise ValueError(
            f"{where}: expected `messages` or `prompt`, and the model's `answer` to it, found the "
            f"fields {sorted(row)}; let the model answer first with `python -m training answers`"
        )
    return FilePrompt(tuple(messages), prompt, answer, tuple(ids), str(row.get("task") or _NO_TASK))
