"""What kinds of prompts are made of: a draw, what came out, and how parts are laid out."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from training.prompts.passages import Library, Passage
from training.prompts.wordings_file import choose, phrases
from training.prompts.written import Written

Position = Literal["end", "start", "both", "middle"]
_POSITIONS: dict[Position, float] = {"end": 0.62, "start": 0.14, "both": 0.14, "middle": 0.10}
_SYSTEM_SHARE = 0.12


@dataclass(frozen=True, slots=True)
class Draw:
    """What a kind is asked to make."""

    rng: random.Random
    """The prompt's own generator; the only source of chance."""
    library: Library
    written: Written
    tokens: int
    """Length to aim at."""
    language: str
    """`en` or `zh`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One prompt, as a chat or as it is."""

    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""
    position: str = "end"
    """Where the request stands beside the material."""
    reference: str = ""
    """What a writer or the construction says is right; for looking at, never trained on."""
    max_new_tokens: int = 64

    @property
    def text(self) -> str:
        """All words, for counting and checking."""
        return self.prompt or "\n\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of prompt."""

    name: str
    """For statistics only."""
    weight: float
    """How often it is drawn."""
    local: bool
    """Whether, by construction, no far context is needed."""
    make: Callable[[Draw], Made | None]
    """None where this draw cannot be made: too little was written, or a text is unfit."""
    languages: tuple[str, ...] = ("en", "zh")


def lay_out(
    draw: Draw, kind: str, parts: list[str], fields: dict[str, str], hint: str = ""
) -> tuple[str, str]:
    """Put a request around material: after it, before it, both, or in its middle.

    Args:
        draw: the source of chance.
        kind: of the wording.
        parts: of the material; the request stands between two of them where it is in the middle.
        fields: what the wording's braces are filled with.
        hint: on the answer's form, after the request.

    Returns: the text; the position's name.
    """
    rng = draw.rng
    position: Position = rng.choices(list(_POSITIONS), weights=list(_POSITIONS.values()))[0]
    if position == "middle" and len(parts) < 3:
        position = "end"
    precede, follow = position in ("start", "both", "middle"), position != "start"
    wording = choose(rng, kind, draw.language, precede, follow)
    # Material may hold braces: fields are put in one by one, not by format.
    ask, lead = fill(wording.ask, fields), fill(wording.lead, fields)
    if hint:
        ask = f"{ask} {hint}" if draw.language == "en" else f"{ask}{hint}"
    material = "\n\n".join(parts)
    if position == "end":
        pieces = [lead, material, ask]
    elif position == "start":
        pieces = [ask, material]
    elif position == "both":
        pieces = [ask, material, ask]
    else:
        cut = rng.randrange(1, len(parts))
        pieces = ["\n\n".join(parts[:cut]), ask, "\n\n".join(parts[cut:])]
    return "\n\n".join(piece for piece in pieces if piece), position


def fill(wording: str, fields: dict[str, str]) -> str:
    """Put fields into the braces of a wording."""
    for name, value in fields.items():
        wording = wording.replace("{" + name + "}", value)
    return wording


def finish(
    draw: Draw,
    text: str,
    *,
    position: str = "end",
    reference: str = "",
    max_new_tokens: int = 64,
    raw_share: float = 0.08,
) -> Made:
    """Make a chat, now and then with a system message, or a raw prompt, of a text."""
    if draw.rng.random() < raw_share:
        return Made(
            prompt=text, position=position, reference=reference, max_new_tokens=max_new_tokens
        )
    return Made(
        messages=chat(draw, text),
        position=position,
        reference=reference,
        max_new_tokens=max_new_tokens,
    )


def chat(draw: Draw, text: str) -> tuple[dict[str, str], ...]:
    """Make the user's turn, and now and then a system message before it."""
    turns = [{"role": "user", "content": text}]
    if draw.rng.random() < _SYSTEM_SHARE:
        system = draw.rng.choice(phrases("system", draw.language))
        turns.insert(0, {"role": "system", "content": system})
    return tuple(turns)


def headed(draw: Draw, pieces: list[str]) -> list[str]:
    """Put one of the usual heads before each of several passages."""
    head = draw.rng.choice(phrases("heads", draw.language))
    return [f"{head.replace('{n}', str(at))}{piece}" for at, piece in enumerate(pieces, start=1)]


def paragraphs_of(text: str) -> list[str]:
    """Cut a text into its paragraphs."""
    return [piece for piece in text.split("\n\n") if piece.strip()]


def long_document(draw: Draw, passage: Passage | None, group: str) -> str:
    """Give one document of about the drawn length, holding the passage if there is one.

    A text that is too short is followed, or preceded, by others of the same work.
    """
    rng, library = draw.rng, draw.library
    if passage:
        index, run = passage.text_index, library.around(rng, passage, draw.tokens)
    else:
        index = longest_of(draw, group)
        run = library.run(rng, index, draw.tokens)
    text = library.texts[index]
    pieces, chars = [run], len(run)
    wanted, used = library.chars(text, draw.tokens), {index}
    others = library.indices(f"source/{text.source}")
    others = [at for at in others if library.texts[at].language == text.language]
    for other in rng.sample(others, min(len(others), 60)):
        if chars > 0.85 * wanted:
            break
        if other not in used:
            used.add(other)
            more = library.run(rng, other, int(draw.tokens * (1 - chars / wanted)) + 50)
            pieces.insert(rng.randrange(len(pieces) + 1), more)
            chars += len(more)
    return "\n\n".join(pieces)


def longest_of(draw: Draw, group: str, tries: int = 4) -> int:
    """Draw a few texts of a group, and take the longest."""
    found = [draw.library.draw_index(draw.rng, group) for _ in range(tries)]
    return max(found, key=lambda index: len(draw.library.texts[index].text))


def pick_question(draw: Draw, pool: str = "questions") -> Any:
    """Draw a written question in the drawn language, or None."""
    return pick(draw, getattr(draw.written, pool))


def pick(draw: Draw, pool: list[Any]) -> Any:
    """Draw something written in the drawn language, or None."""
    fitting = [found for found in pool if found.language == draw.language]
    return draw.rng.choice(fitting) if fitting else None
