"""First pass: requests that a writer model answers with questions, abstracts and dialogues."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.prompts.passages import Library, Passage

_WORDS = json.loads(Path(__file__).with_name("wordings").joinpath("writer.json").read_text("utf-8"))
_SHARES = {
    "question": 0.56,
    "two_facts": 0.12,
    "abstract": 0.13,
    "dialogue": 0.025,
    "short_dialogue": 0.06,
    "instruction": 0.10,
}
_ANSWER_TOKENS = {
    "question": 110,
    "two_facts": 130,
    "abstract": 170,
    "dialogue": 520,
    "short_dialogue": 330,
    "instruction": 60,
}
_CHINESE_SHARE = 0.16
_CODE_SHARE = 0.06
_PIECES = (2, 7)
"""Requests that together make a long dialogue."""


def make_requests(library: Library, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Make requests to a writer; request i depends on the seed and i alone.

    Args:
        library: where passages come from.
        count: number of requests.
        seed: of all of them.

    Returns: rows of `id`, `kind`, `messages`, `max_new_tokens`, and `about`, from which the second
        pass finds the passages again.
    """
    index = 0
    while index < count:
        rng = random.Random(f"{seed}/write/{index}")
        kind = rng.choices(list(_SHARES), weights=list(_SHARES.values()))[0]
        rows = _dialogue(library, rng) if kind == "dialogue" else [_single(kind, library, rng)]
        for row in rows[: count - index]:
            name = f"{row['kind']}-{seed}-{index:06d}"
            yield {"id": name, "max_new_tokens": _ANSWER_TOKENS[kind], **row}
            index += 1


def _single(kind: str, library: Library, rng: random.Random) -> dict[str, Any]:
    language = "zh" if rng.random() < _CHINESE_SHARE else "en"
    words = _WORDS[language]
    group = _group(rng, language, allow_code=kind in ("question", "instruction"))
    passages = [library.passage(rng, group)]
    about: dict[str, Any] = {"language": language}
    if kind == "two_facts":
        passages.append(library.passage(rng, _group(rng, language)))
    if kind == "question":
        about["answer_type"] = rng.choice(sorted(words["answer_types"]))
        asked = rng.choice(words["question"]).format(
            type=words["answer_types"][about["answer_type"]],
            passage=library.words(passages[0]),
        )
    else:
        texts = [library.words(passage) for passage in passages]
        asked = rng.choice(words[kind]).format(
            passage=texts[0],
            second=texts[-1],
            topic=rng.choice(words["settings"]),
            names=_names(rng, words["names"]),
        )
    about["passages"] = [_reference(library, passage) for passage in passages]
    return {"kind": kind, "messages": _user(asked), "about": about}


def _dialogue(library: Library, rng: random.Random) -> list[dict[str, Any]]:
    """Ask for the pieces of one long dialogue: the same speakers, one passage a piece."""
    language = "zh" if rng.random() < _CHINESE_SHARE else "en"
    words = _WORDS[language]
    setting, names = rng.choice(words["settings"]), _names(rng, words["names"])
    group = f"{rng.getrandbits(48):012x}"
    source = library.texts[library.passage(rng, _group(rng, language)).text_index].source
    rows = []
    for number in range(rng.randint(*_PIECES)):
        passage = library.passage(rng, f"source/{source}")
        asked = rng.choice(words["dialogue"]).format(
            passage=library.words(passage), topic=setting, names=names
        )
        about = {
            "language": language,
            "group": group,
            "number": number,
            "passages": [_reference(library, passage)],
        }
        rows.append({"kind": "dialogue", "messages": _user(asked), "about": about})
    return rows


def _group(rng: random.Random, language: str, allow_code: bool = False) -> str:
    return "code" if allow_code and language == "en" and rng.random() < _CODE_SHARE else language


def _names(rng: random.Random, names: list[str]) -> str:
    return ", ".join(rng.sample(names, rng.choice((2, 2, 3, 4))))


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _reference(library: Library, passage: Passage) -> dict[str, Any]:
    return {
        "text": passage.text_index,
        "start": passage.start,
        "end": passage.end,
        "sha256": passage_digest(library.words(passage)),
    }


def passage_digest(words: str) -> str:
    """Name a passage by its content, so that another file of texts is noticed."""
    return hashlib.sha256(words.encode()).hexdigest()[:16]
