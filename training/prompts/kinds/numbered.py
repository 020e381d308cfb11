"""Kinds on many passages: which one follows, is a stranger, stands twice, proves an answer."""

import random
from dataclasses import dataclass

from training.prompts.kinds.drawing import (
    Draw,
    Kind,
    Made,
    finish,
    headed,
    lay_out,
    longest_of,
    paragraphs_of,
    pick_question,
)
from training.prompts.kinds.far import other_passages
from training.prompts.kinds.sentences import opening, squeezed
from training.prompts.passages import Passage
from training.prompts.wordings_file import phrases

_LONG = {
    "en": ("book", "essay", "novel", "story", "report", "policy", "rfc", "manual"),
    "zh": ("book", "news", "manual", "help"),
}


@dataclass(frozen=True, slots=True)
class _Numbered:
    """Passages, each behind a label of its own."""

    parts: list[str]
    labels: list[str]
    """Without the marks around them."""


def _number(draw: Draw, pieces: list[str]) -> _Numbered:
    """Put a label before each passage: a number, a number that does not count, or a code."""
    rng = draw.rng
    label = rng.choice(phrases("labels", draw.language))
    style = rng.random()
    if style < 0.6:
        names = [str(at) for at in range(1, len(pieces) + 1)]
    elif style < 0.8:
        names = [str(at) for at in rng.sample(range(100, 1000), len(pieces))]
    else:
        names = [f"{rng.choice('ABCDEFGHJKLMNPQRSTUVWXYZ')}{at}" for at in range(len(pieces))]
    heads = [label.replace("{n}", name) for name in names]
    joint = rng.choice(("", "\n"))
    parts = [f"{head}{joint}{piece}" for head, piece in zip(heads, pieces, strict=True)]
    return _Numbered(parts, [head.strip(": ：") for head in heads])


def next_passage(draw: Draw) -> Made | None:
    """Passages out of their order: which of them follows the one that begins with some words."""
    rng = draw.rng
    pieces, following = _shuffled_runs(draw)
    openings = [opening(piece, draw.language) for piece in pieces]
    fit = [at for at in following if openings.count(openings[at]) == 1]
    if not fit:
        return None
    asked = rng.choice(fit)
    numbered = _number(draw, pieces)
    fields = {"quote": openings[asked], "label": numbered.labels[0]}
    text, position = lay_out(draw, "next_passage", numbered.parts, fields)
    reference = numbered.labels[following[asked]]
    return finish(draw, text, position=position, reference=reference, max_new_tokens=32)


def _shuffled_runs(draw: Draw) -> tuple[list[str], dict[int, int]]:
    """Cut long texts into passages and shuffle these.

    Returns: passages; the place of each that another follows in its text, to that other's place.
    """
    rng, library = draw.rng, draw.library
    group = f"{draw.language}/{rng.choice(_LONG[draw.language])}"
    size = rng.randint(250, 1200) if draw.language == "en" else rng.randint(90, 400)
    pieces: list[tuple[int, int, str]] = []
    used: set[int] = set()
    left = float(draw.tokens)
    for _ in range(60):
        index = longest_of(draw, group)
        if left < 60 or index in used:
            break
        used.add(index)
        run = library.run(rng, index, int(left))
        left -= len(run) / max(1, library.chars(library.texts[index], 1000)) * 1000
        pieces += [(index, at, piece) for at, piece in enumerate(_grouped(run, size))]
    rng.shuffle(pieces)
    places = {(index, at): place for place, (index, at, _) in enumerate(pieces)}
    following = {
        place: places[index, at + 1]
        for (index, at), place in places.items()
        if (index, at + 1) in places
    }
    return [piece for _, _, piece in pieces], following


def _grouped(text: str, chars: int) -> list[str]:
    """Put paragraphs together until each piece has so many characters."""
    pieces = [""]
    for paragraph in paragraphs_of(text):
        if len(pieces[-1]) >= chars:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]}\n\n{paragraph}".strip()
    return pieces


def _of_one_work(draw: Draw) -> tuple[Passage, list[str]] | None:
    """Draw a passage and many others of its work, up to the drawn length."""
    rng, library = draw.rng, draw.library
    for _ in range(20):
        first = library.passage(rng, draw.language)
        text = library.texts[first.text_index]
        group, wanted = f"source/{text.source}", library.chars(text, draw.tokens)
        have = sum(len(library.texts[index].text) for index in library.indices(group))
        if have > 1.5 * wanted:
            break
    else:
        return None
    found = {library.words(first): first}
    chars = len(library.words(first))
    for _ in range(300):
        if chars >= wanted and len(found) > 2:
            break
        passage = library.passage(rng, group)
        words = library.words(passage)
        overlaps = any(
            passage.text_index == other.text_index
            and passage.start < other.end
            and other.start < passage.end
            for other in found.values()
        )
        if not overlaps and words not in found:
            found[words] = passage
            chars += len(words)
    return (first, list(found)) if len(found) > 2 else None


def odd_passage(draw: Draw) -> Made | None:
    """Passages of one work and one of another, to be found."""
    work = _of_one_work(draw)
    if not work:
        return None
    first, pieces = work
    rng, library = draw.rng, draw.library
    own = library.texts[first.text_index]
    for _ in range(20):
        other = library.passage(rng, draw.language)
        text = library.texts[other.text_index]
        if text.source != own.source and text.register != own.register:
            break
    else:
        return None
    stranger = library.words(other)
    pieces.insert(rng.randrange(len(pieces) + 1), stranger)
    numbered = _number(draw, pieces)
    text_, position = lay_out(draw, "odd_passage", numbered.parts, {"label": numbered.labels[0]})
    reference = numbered.labels[pieces.index(stranger)]
    return finish(draw, text_, position=position, reference=reference, max_new_tokens=48)


def passage_twice(draw: Draw) -> Made | None:
    """Passages of which one stands there twice, to be found."""
    rng = draw.rng
    passage = draw.library.passage(rng, draw.language)
    pieces = list(dict.fromkeys(other_passages(draw, (passage,), 0)))
    if len(pieces) < 2:
        return None
    double = rng.choice(pieces)
    pieces.insert(rng.randrange(len(pieces) + 1), double)
    numbered = _number(draw, pieces)
    text, position = lay_out(draw, "passage_twice", numbered.parts, {"label": numbered.labels[0]})
    places = [at for at, piece in enumerate(pieces) if piece == double]
    reference = ", ".join(numbered.labels[at] for at in places)
    return finish(draw, text, position=position, reference=reference, max_new_tokens=48)


def support(draw: Draw) -> Made | None:
    """A statement or a question, and which of many passages proves or answers it."""
    question = pick_question(draw)
    if not question:
        return None
    own = draw.library.words(question.passages[0])
    pieces = [own, *other_passages(draw, question.passages, len(own))]
    draw.rng.shuffle(pieces)
    numbered = _number(draw, pieces)
    fields = {
        "question": question.question,
        "words": question.answer,
        "label": numbered.labels[0],
    }
    text, position = lay_out(draw, "support", numbered.parts, fields)
    reference = numbered.labels[pieces.index(own)]
    return finish(draw, text, position=position, reference=reference, max_new_tokens=48)


def several_questions(draw: Draw) -> Made | None:
    """Two to five questions to answer at once, their passages among many others."""
    rng, library = draw.rng, draw.library
    drawn = [pick_question(draw) for _ in range(rng.randint(2, 5))]
    questions = list({found.passages[0]: found for found in drawn if found}.values())
    if len(questions) < 2:
        return None
    passages = tuple(found.passages[0] for found in questions)
    needles = [library.words(passage) for passage in passages]
    pieces = needles + other_passages(draw, passages, sum(map(len, needles)))
    rng.shuffle(pieces)
    items = _listed(rng, [found.question for found in questions])
    text, position = lay_out(draw, "several_questions", headed(draw, pieces), {"items": items})
    reference = "\n".join(found.answer for found in questions)
    return finish(draw, text, position=position, reference=reference, max_new_tokens=200)


def _listed(rng: random.Random, lines: list[str]) -> str:
    style = rng.choice(("{n}. ", "({n}) ", "Q{n}: ", "- ", "{n}) ", ""))
    return "\n".join(
        style.replace("{n}", str(at)) + squeezed(line) for at, line in enumerate(lines, start=1)
    )


KINDS = [
    Kind(name="next_passage", weight=1.5, local=False, make=next_passage),
    Kind(name="odd_passage", weight=1.5, local=False, make=odd_passage),
    Kind(name="passage_twice", weight=1.5, local=False, make=passage_twice),
    Kind(name="support", weight=2, local=False, make=support),
    Kind(name="several_questions", weight=2, local=False, make=several_questions),
]
