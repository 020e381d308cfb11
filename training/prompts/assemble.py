"""Second pass: prompts of many kinds and lengths from texts and what a writer wrote."""

import logging
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from training.prompts.answers import render
from training.prompts.kinds import KINDS
from training.prompts.kinds.drawing import Draw, Kind, Made
from training.prompts.passages import Library
from training.prompts.written import Written

logger = logging.getLogger(__name__)

_CHINESE_SHARE = 0.16
_MIDDLE_SHARE = 0.55
"""Share of lengths drawn from 4K to 16K tokens; the others from the whole range."""
_MIDDLE = (4096, 16384)
_TRIES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """How many prompts, and how long."""

    count: int = 4000
    """Prompts."""
    seed: int = 0
    """Of all chance; prompt i depends on it and on i alone."""
    min_tokens: int = 1024
    """Shortest length drawn."""
    max_tokens: int = 32000
    """Longest prompt, by the model's tokenizer and with its chat template."""

    def __post_init__(self) -> None:
        if not 256 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"expected max_tokens of at least min_tokens ({self.min_tokens}), and these of at "
                f"least 256, found {self.max_tokens}; correct --max_tokens"
            )


@dataclass(slots=True)
class _State:
    """What worker processes inherit."""

    library: Library
    written: Written
    tokenizer: Any
    settings: PromptSettings


_inherited: list[_State] = []


def assemble(
    library: Library, written: Written, tokenizer: Any, settings: PromptSettings, workers: int
) -> Iterator[dict[str, Any]]:
    """Make prompts in their order, each in one of the processes.

    Args:
        library: texts.
        written: a writer's questions, abstracts and dialogues.
        tokenizer: the model's, from transformers.
        settings: count, lengths, seed.
        workers: processes; 1: this one.

    Returns: rows of `id`, `kind`, `local`, `language`, `position`, `tokens`, `reference`,
        `max_new_tokens`, and `messages` or `prompt`.
    """
    _inherited[:] = [_State(library, written, tokenizer, settings)]
    # Forked processes inherit a tokenizer whose threads are not there any more.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if workers == 1:
        yield from _reported(map(make_prompt, range(settings.count)), settings.count)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        made = pool.imap(make_prompt, range(settings.count), chunksize=8)
        yield from _reported(made, settings.count)


def _reported(rows: Iterator[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    started = time.monotonic()
    for number, row in enumerate(rows, start=1):
        yield row
        if number % 500 == 0 or number == count:
            logger.info("%d of %d prompts, %.0f s", number, count, time.monotonic() - started)


def make_prompt(index: int) -> dict[str, Any]:
    """Make prompt `index` of the state that `assemble` left for the process.

    Raises: ValueError: no kind can be made of what there is.
    """
    [state] = _inherited
    settings = state.settings
    rng = random.Random(f"{settings.seed}/prompt/{index}")
    tokens = draw_tokens(rng, settings)
    language = "zh" if rng.random() < _CHINESE_SHARE else "en"
    for _ in range(_TRIES):
        fitting = [kind for kind in KINDS if language in kind.languages]
        kind = rng.choices(fitting, weights=[kind.weight for kind in fitting])[0]
        row = _fitted(state, kind, language, tokens, rng)
        if row:
            return {"id": f"p-{settings.seed}-{index:06d}", **row}
    raise ValueError(
        f"expected one of {_TRIES} draws to make prompt {index}, found none that can; give more "
        "texts, and more answers of the writer"
    )


def draw_tokens(rng: random.Random, settings: PromptSettings) -> int:
    """Draw a length log-uniformly, more than half of them from 4K to 16K tokens."""
    low, high = settings.min_tokens, settings.max_tokens
    if rng.random() < _MIDDLE_SHARE and low < _MIDDLE[1] and high > _MIDDLE[0]:
        low, high = max(low, _MIDDLE[0]), min(high, _MIDDLE[1])
    return int(math.exp(rng.uniform(math.log(low), math.log(high))))


def _fitted(
    state: _State, kind: Kind, language: str, tokens: int, rng: random.Random
) -> dict[str, Any] | None:
    """Make one prompt of a kind that is not too long, or None where the kind cannot."""
    goal = tokens
    for _ in range(4):
        draw = Draw(rng, state.library, state.written, max(200, goal - 120), language)
        made = kind.make(draw)
        if made is None:
            return None
        row = _row(kind, made, language)
        text = render({"id": "", **row}, state.tokenizer)
        row["tokens"] = len(
            state.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        )
        if row["tokens"] <= min(state.settings.max_tokens, max(1.35 * tokens, 1200)):
            return row
        goal = int(goal * 0.9 * tokens / row["tokens"])
    return row if row["tokens"] <= state.settings.max_tokens else None


def _row(kind: Kind, made: Made, language: str) -> dict[str, Any]:
    asked = {"messages": list(made.messages)} if made.messages else {"prompt": made.prompt}
    return {
        "kind": kind.name,
        "local": kind.local,
        "language": language,
        "position": made.position,
        "reference": made.reference,
        "max_new_tokens": made.max_new_tokens,
        **asked,
    }
