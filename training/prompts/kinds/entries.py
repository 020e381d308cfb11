"""Material made of entries up to a length, and one of several requests about it."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from training.prompts.kinds.drawing import Draw, Made, fill, finish, lay_out
from training.prompts.wordings_file import choose

_TOKEN_PARTS = re.compile(
    r"(?P<chinese>[\u3000-\u9fff\uff00-\uffef])|(?P<digit>\d)|(?P<word>[^\W\d_]+)|(?P<sign>\S)"
)
_SHARES = {"chinese": 0.75, "digit": 1.0, "sign": 0.7}
_FEWEST, _MOST = 3, 6000
MOST_COUNTED = 12
"""Counts and lists that are asked for are not longer."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request about the material."""

    wording: str
    """The kind of wording."""
    fields: dict[str, str] = field(default_factory=dict)
    reference: str = ""
    max_new_tokens: int = 48


def estimate_tokens(text: str) -> float:
    """Estimate the tokens of structured text, whose digits and signs are a token each."""
    total = 0.0
    for part in _TOKEN_PARTS.finditer(text):
        kind = part.lastgroup or "sign"
        total += _SHARES.get(kind) or 1 + (part.end() - part.start() - 1) // 6
    return total


def grow(draw: Draw, make: Callable[[], T], render: Callable[[T], str]) -> list[T]:
    """Make entries until they, as they will be written, fill the drawn length."""
    entries: list[T] = []
    left = draw.tokens - 60.0
    while (left > 0 or len(entries) < _FEWEST) and len(entries) < _MOST:
        entries.append(make())
        left -= estimate_tokens(render(entries[-1])) + 0.5
    return entries


def once(entries: Iterable[T], key: Callable[[T], object]) -> list[T]:
    """Keep the entries that no other one is like in some respect."""
    listed = list(entries)
    counts = Counter(map(key, listed))
    return [entry for entry in listed if counts[key(entry)] == 1]


def at_most_one(draw: Draw, entries: Iterable[T], key: Callable[[T], object]) -> list[T]:
    """Draw one of the entries that no other one is like in some respect, if there are any."""
    alone = once(entries, key)
    return [draw.rng.choice(alone)] if alone else []


def asked(draw: Draw, parts: list[str], asks: list[Ask], fence: str | None = None) -> Made | None:
    """Lay out material with one of the requests.

    Args:
        draw: the source of chance.
        parts: of the material.
        asks: those that this material allows; the draw fails where there are none.
        fence: how a fence of code around the material is marked; None: there is never one.
    """
    if not asks:
        return None
    ask = draw.rng.choice(asks)
    if fence is not None and draw.rng.random() < 0.3:
        parts = [f"```{fence}\n" + "\n".join(parts) + "\n```"]
    text, position = lay_out(draw, ask.wording, parts, ask.fields)
    return finish(
        draw,
        text,
        position=position,
        reference=ask.reference,
        max_new_tokens=ask.max_new_tokens,
        raw_share=0.06,
    )


def asked_last(draw: Draw, material: str, ask: Ask) -> Made:
    """Put a request, with what it is about, after material that it does not need."""
    wording = choose(draw.rng, ask.wording, draw.language)
    pieces = (wording.lead, material, fill(wording.ask, ask.fields))
    return finish(
        draw,
        "\n\n".join(piece for piece in pieces if piece),
        reference=ask.reference,
        max_new_tokens=ask.max_new_tokens,
        raw_share=0.05,
    )
