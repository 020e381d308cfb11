"""Kinds whose context is examples: classification, questions and answers, chats with summaries."""

import re
from collections.abc import Callable

from training.prompts.kinds.drawing import Draw, Kind, Made, fill, finish, pick, pick_question
from training.prompts.wordings_file import choose, labels, phrases

_LINE_CHARS = (40, 420)
_RAW_SHARE = 0.45


def _shots(
    draw: Draw, kind: str, examples: list[tuple[str, str]], fields: dict[str, str]
) -> tuple[str, str]:
    """Lay out examples and a last one without its answer.

    Returns: the text; the last one's answer.
    """
    rng = draw.rng
    wording = choose(rng, kind, draw.language)
    form = rng.choice(phrases(f"{kind}_forms", draw.language))
    *shown, (last, answer) = examples
    pieces = [fill(form, {"input": given, "label": label}) for given, label in shown]
    query = fill(form, {"input": last, "label": ""}).rstrip()
    joint = (
        "\n" if all(len(piece) < 300 for piece in pieces[:20]) and rng.random() < 0.5 else "\n\n"
    )
    body = joint.join([*pieces, query])
    text = "\n\n".join(part for part in (fill(wording.ask, fields), body) if part)
    return text, answer


def classify(draw: Draw) -> Made | None:
    """Many labelled examples, and one to label."""
    make = draw.rng.choice((_question_types, _registers, _works, _sentiments, _languages))
    examples = make(draw)
    if len(examples) < 8 or len({label for _, label in examples}) < 2:
        return None
    names = ", ".join(sorted({label for _, label in examples}))
    text, answer = _shots(draw, "classify", examples, {"labels": names})
    return finish(draw, text, reference=answer, max_new_tokens=24, raw_share=_RAW_SHARE)


def _fill_up(
    draw: Draw, make_one: Callable[[], tuple[str, str] | None], per_example: int = 12
) -> list[tuple[str, str]]:
    """Draw examples up to the drawn length."""
    chars = draw.tokens * (3.6 if draw.language == "en" else 1.4)
    examples: list[tuple[str, str]] = []
    seen: set[str] = set()
    for _ in range(4000):
        if chars <= 0:
            break
        found = make_one()
        if found and found[0] not in seen:
            seen.add(found[0])
            examples.append(found)
            chars -= len(found[0]) + len(found[1]) + per_example
    return examples


def _question_types(draw: Draw) -> list[tuple[str, str]]:
    """Written questions by the kind of answer they ask for."""
    names = labels("answer_types", draw.language)

    def one() -> tuple[str, str] | None:
        question = pick_question(draw)
        if not question or question.answer_type not in names:
            return None
        return question.question, names[question.answer_type]

    return _fill_up(draw, one) if pick_question(draw) else []


def _line(draw: Draw, group: str) -> str:
    """Draw one short paragraph."""
    library, rng = draw.library, draw.rng
    low, high = _LINE_CHARS if draw.language == "en" else (15, 160)
    for _ in range(20):
        words = library.run(rng, library.draw_index(rng, group), 220)
        lines = [" ".join(piece.split()) for piece in re.split(r"\n\n", words)]
        lines = [line[:high] for line in lines if len(line) >= low]
        if lines:
            return rng.choice(lines)
    return ""


def _labelled_lines(draw: Draw, groups: dict[str, str]) -> list[tuple[str, str]]:
    names = sorted(groups)

    def one() -> tuple[str, str] | None:
        label = draw.rng.choice(names)
        line = _line(draw, groups[label])
        return (line, label) if line else None

    return _fill_up(draw, one)


def _registers(draw: Draw) -> list[tuple[str, str]]:
    """Sentences by kind of writing."""
    groups = draw.library.groups(f"{draw.language}/")
    chosen = draw.rng.sample(groups, min(len(groups), draw.rng.randint(3, 9)))
    return _labelled_lines(draw, {group.split("/")[1]: group for group in chosen})


def _works(draw: Draw) -> list[tuple[str, str]]:
    """Sentences by the work they are from."""
    library = draw.library
    groups = [
        group
        for group in library.groups("source/")
        if library.texts[library.indices(group)[0]].language == draw.language
    ]
    chosen = draw.rng.sample(groups, min(len(groups), draw.rng.randint(3, 12)))
    return _labelled_lines(draw, {group.split("/", 1)[1]: group for group in chosen})


def _languages(draw: Draw) -> list[tuple[str, str]]:
    """Lines of code by programming language or by library."""
    groups = [
        group
        for group in draw.library.groups("source/")
        if draw.library.texts[draw.library.indices(group)[0]].is_code
    ]
    chosen = draw.rng.sample(groups, min(len(groups), draw.rng.randint(3, 10)))
    return _labelled_lines(draw, {group.split("/", 1)[1]: group for group in chosen})


def _sentiments(draw: Draw) -> list[tuple[str, str]]:
    """Reviews by whether their writers were pleased; Chinese alone."""
    library, rng = draw.library, draw.rng
    indices = library.indices("zh/review")
    if draw.language != "zh" or not indices:
        return _registers(draw)
    pleased, not_pleased = rng.choice(
        (("正面", "负面"), ("好评", "差评"), ("positive", "negative"))
    )

    def one() -> tuple[str, str] | None:
        text = library.texts[rng.choice(indices)]
        label = pleased if text.title.startswith("pos") else not_pleased
        return rng.choice(text.text.split("\n\n"))[:200], label

    return _fill_up(draw, one)


def qa_shots(draw: Draw) -> Made | None:
    """Passages with questions and answers as examples, then one to answer."""
    first = pick_question(draw)
    if not first:
        return None
    budget = draw.tokens * (3.8 if draw.language == "en" else 1.4)
    examples: list[tuple[str, str]] = []
    seen = set()
    for _ in range(300):
        question = pick_question(draw)
        if budget <= 0 and len(examples) >= 2:
            break
        if question.question not in seen:
            seen.add(question.question)
            passage = draw.library.words(question.passages[0])
            given = (
                f"{passage}\n{draw.rng.choice(phrases('ask', draw.language))}{question.question}"
            )
            examples.append((given, question.answer))
            budget -= len(given)
    if len(examples) < 2:
        return None
    text, answer = _shots(draw, "qa_shots", examples, {})
    return finish(draw, text, reference=answer, max_new_tokens=40, raw_share=_RAW_SHARE)


def dialogue_shots(draw: Draw) -> Made | None:
    """Chats with their summaries as examples, then a chat to summarise."""
    if not pick(draw, draw.written.short_dialogues):
        return None
    budget = draw.tokens * (3.8 if draw.language == "en" else 1.4)
    examples: list[tuple[str, str]] = []
    for _ in range(200):
        if budget <= 0 and len(examples) >= 2:
            break
        found = pick(draw, draw.written.short_dialogues)
        talk = "\n".join(found.turns)
        if talk not in {given for given, _ in examples}:
            examples.append((talk, found.summary))
            budget -= len(talk) + len(found.summary)
    if len(examples) < 2:
        return None
    text, answer = _shots(draw, "dialogue_shots", examples, {})
    return finish(draw, text, reference=answer, max_new_tokens=90, raw_share=_RAW_SHARE)


KINDS = [
    Kind(name="classify_shots", weight=7, local=False, make=classify),
    Kind(name="qa_shots", weight=3, local=True, make=qa_shots),
    Kind(name="dialogue_shots", weight=4, local=True, make=dialogue_shots),
]
