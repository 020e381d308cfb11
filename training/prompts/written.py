"""What a writer model wrote, parsed and filtered."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from training.prompts.asking import passage_digest
from training.prompts.passages import Library, Passage

_PAIR = re.compile(
    r"(?:Question|问题)\**\s*[:：]\**\s*(?P<question>.+?)\s*\n+\s*\**(?:Answer|答案)\**\s*[:：]\**\s*"
    r"(?P<answer>.+?)(?:\n|$)",
    re.S | re.I,
)
_REFUSALS = re.compile(
    r"\b(?:I'm sorry|I am sorry|as an AI|I cannot|I can't|no information"
    r"|not (?:provided|mentioned|specified|given)|does not (?:mention|provide|specify))"
    r"|抱歉|无法|没有提到|未提及|未提供",
    re.I,
)
_POINTING = re.compile(
    r"\b(?:the|this|first|second) (?:passage|text|document|excerpt)\b|\b(?:text|passage) [AB12]\b"
    r"|本文|这段|文中|上文|材料[一二]",
    re.I,
)
_HEADING = re.compile(r"^\**(?:Request|Message|Abstract|Summary|请求|摘要)\**\s*[:：]\**")
_TURN = re.compile(r"^\**(?P<name>[\w .'\u4e00-\u9fff-]{1,24}?)\**\s*[:：]\**\s*(?P<words>\S.*)$")


@dataclass(frozen=True, slots=True)
class Question:
    """A question that a writer asked about one passage or two."""

    question: str
    answer: str
    passages: tuple[Passage, ...]
    answer_type: str
    language: str


@dataclass(frozen=True, slots=True)
class Abstract:
    """An abstract, or a request, that a writer wrote for a passage."""

    words: str
    passage: Passage
    language: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns, each a line of a name and words; a summary where one was asked for."""

    turns: tuple[str, ...]
    summary: str
    language: str


@dataclass(slots=True)
class Written:
    """All that passed the filters."""

    questions: list[Question] = field(default_factory=list)
    two_facts: list[Question] = field(default_factory=list)
    abstracts: list[Abstract] = field(default_factory=list)
    instructions: list[Abstract] = field(default_factory=list)
    dialogues: list[Dialogue] = field(default_factory=list)
    short_dialogues: list[Dialogue] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that were not kept, by kind and reason."""


def read_written(rows: Iterable[dict[str, Any]], library: Library) -> Written:
    """Parse a writer's answers and keep the usable ones.

    Args:
        rows: `kind`, `about`, `answer`.
        library: the texts that the requests were made from.

    Raises: ValueError: a passage is not where the request says: other texts.
    """
    written = Written()
    pieces: dict[str, dict[int, list[str]]] = defaultdict(dict)
    languages: dict[str, str] = {}
    seen: set[str] = set()
    for row in rows:
        kind, about, answer = row["kind"], row["about"], row["answer"].strip()
        passages = tuple(_found(library, reference) for reference in about["passages"])
        reason = _unusable(answer, seen)
        if not reason and kind in ("question", "two_facts"):
            reason = _add_question(written, kind, about, answer, passages, library)
        elif not reason and kind == "dialogue":
            turns = _turns(answer)
            reason = "few turns" if len(turns) < 6 else ""
            if not reason:
                pieces[about["group"]][about["number"]] = turns
                languages[about["group"]] = about["language"]
        elif not reason and kind == "short_dialogue":
            reason = _add_short_dialogue(written, about, answer)
        elif not reason:
            reason = _add_abstract(written, kind, about, answer, passages[0], library)
        if reason:
            written.dropped[f"{kind}: {reason}"] += 1
    for group, numbered in sorted(pieces.items()):
        turns = [turn for _, piece in sorted(numbered.items()) for turn in piece]
        written.dialogues.append(Dialogue(tuple(turns), "", languages[group]))
    return written


def _found(library: Library, reference: dict[str, Any]) -> Passage:
    passage = Passage(reference["text"], reference["start"], reference["end"])
    known = passage.text_index < len(library.texts)
    if not known or passage_digest(library.words(passage)) != reference["sha256"]:
        raise ValueError(
            f"expected the passage {reference} in the texts, found another; give the --texts that "
            "the writer's requests were made from"
        )
    return passage


def _unusable(answer: str, seen: set[str]) -> str:
    key = re.sub(r"\W+", "", answer.lower())[:160]
    if len(key) < 8:
        return "too short"
    if key in seen:
        return "written before"
    seen.add(key)
    return "refusal" if _REFUSALS.search(answer[:200]) else ""


def _add_question(
    written: Written,
    kind: str,
    about: dict[str, Any],
    answer: str,
    passages: tuple[Passage, ...],
    library: Library,
) -> str:
    """Keep a question, or say why not."""
    pair = _PAIR.search(answer)
    if not pair:
        return "form"
    question, short = (
        " ".join(pair[name].split()).strip('*"“” ') for name in ("question", "answer")
    )
    chinese = about["language"] == "zh"
    if chinese != bool(re.search(r"[\u4e00-\u9fff]", question)):
        return "language"
    if not (6 if chinese else 18) <= len(question) <= 320 or not 1 <= len(short) <= 240:
        return "length"
    if not re.search(r"[?？]", question):
        return "no question"
    if _POINTING.search(question):
        return "points at the text"
    texts = [library.words(passage) for passage in passages]
    if len(question) > 60 and any(question[5:60] in text for text in texts):
        return "copied"
    if kind == "question" and not _is_supported(short, texts[0], chinese):
        return "answer not in the passage"
    if short.lower() in question.lower() and len(short) > 3:
        return "answer in the question"
    kept = written.questions if kind == "question" else written.two_facts
    kept.append(
        Question(question, short, passages, about.get("answer_type", ""), about["language"])
    )
    return ""


def _is_supported(answer: str, passage: str, chinese: bool) -> bool:
    """Tell whether half of the answer's words (or pairs of characters) stand in the passage."""
    if re.match(r"(?:yes|no|是|否)\b", answer, re.I):
        return True
    if chinese:
        squeezed = re.sub(r"\W", "", answer)
        parts = [squeezed[at : at + 2] for at in range(max(1, len(squeezed) - 1))]
    else:
        parts = re.findall(r"\w+", answer.lower())
        parts = [part for part in parts if len(part) > 3] or parts
        passage = passage.lower()
    return bool(parts) and 2 * sum(part in passage for part in parts) >= len(parts)


def _turns(answer: str) -> list[str]:
    found = [_TURN.match(line.strip()) for line in answer.split("\n")]
    # Small writers fall into loops: what was said before is left out.
    turns: dict[str, str] = {}
    for turn in filter(None, found):
        turns.setdefault(turn["words"].strip(), turn["name"].strip())
    return [f"{name}: {words}" for words, name in turns.items()]


def _add_short_dialogue(written: Written, about: dict[str, Any], answer: str) -> str:
    """Keep a chat with its summary, or say why not."""
    talk, mark, summary = re.sub(r"\**(Summary|摘要|总结)\**\s*[:：]\**", "\0", answer).partition(
        "\0"
    )
    turns = _turns(talk)
    summary = " ".join(summary.split()).strip("* ")
    if not mark or len(turns) < 4:
        return "form"
    if not 15 <= len(summary) <= 500:
        return "length"
    written.short_dialogues.append(Dialogue(tuple(turns), summary, about["language"]))
    return ""


def _add_abstract(
    written: Written,
    kind: str,
    about: dict[str, Any],
    answer: str,
    passage: Passage,
    library: Library,
) -> str:
    """Keep an abstract or a request, or say why not."""
    words = _HEADING.sub("", answer)
    words = " ".join(words.split()).strip('"“” ')
    chinese = about["language"] == "zh"
    low, high = ((15, 400) if chinese else (60, 1200)) if kind == "abstract" else (6, 300)
    if not low <= len(words) <= high:
        return "length"
    if chinese != bool(re.search(r"[\u4e00-\u9fff]", words)):
        return "language"
    if kind == "abstract" and _copied_share(words, library.words(passage), chinese) > 0.5:
        return "copied"
    kept = written.abstracts if kind == "abstract" else written.instructions
    kept.append(Abstract(words, passage, about["language"]))
    return ""


def _copied_share(words: str, passage: str, chinese: bool) -> float:
    """Share of the abstract's runs of eight words (twelve Chinese characters) that it copies."""
    size = 12 if chinese else 8
    parts = list(words) if chinese else words.lower().split()
    whole = "".join(passage.split()) if chinese else " ".join(passage.lower().split())
    joint = "" if chinese else " "
    runs = [joint.join(parts[at : at + size]) for at in range(len(parts) - size + 1)]
    return sum(run in whole for run in runs) / len(runs) if runs else 0.0
