"""Wordings: how a request is said, from data files by kind and language."""

import functools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).with_name("wordings")
_FILES = ("far.json", "shots.json", "local.json", "reading.json", "records.json")
_AFTER_ONLY = re.compile(
    r"\b(?:above|preceding|foregoing|you (?:just|have) read|earlier)\b|上面|以上|上文|前面|读完",
    re.I,
)
_BEFORE_ONLY = re.compile(
    r"\b(?:below|following|you will (?:see|find|read))\b|下面|以下|下文", re.I
)


@dataclass(frozen=True, slots=True)
class Wording:
    """What stands before the material, and the request itself."""

    lead: str
    """May be empty."""
    ask: str

    @property
    def may_follow(self) -> bool:
        """Whether the request can stand after the material."""
        return not _BEFORE_ONLY.search(self.ask)

    @property
    def may_precede(self) -> bool:
        """Whether the request can stand before the material."""
        return not _AFTER_ONLY.search(self.ask)


@functools.cache
def wordings(kind: str, language: str) -> tuple[Wording, ...]:
    """Return the wordings of a kind: lines `lead ||| request`, or the request alone.

    Raises: ValueError: there are none.
    """
    found = _read().get(kind, {}).get(language, [])
    if not found:
        raise ValueError(
            f"expected wordings of {kind} in {language}, found none; add some to {_FOLDER}"
        )
    return tuple(_parse(line) for line in found)


@functools.cache
def phrases(name: str, language: str) -> tuple[Any, ...]:
    """Return a list of phrases: heads of passages, hints on form, system messages, names."""
    return tuple(_read_phrases()[name][language])


def labels(name: str, language: str) -> dict[str, str]:
    """Return how each of a list of things is called: the kinds of answers."""
    return dict(_read_phrases()[name][language])


@functools.cache
def _read_phrases() -> dict[str, Any]:
    return json.loads((_FOLDER / "phrases.json").read_text("utf-8"))  # type: ignore[no-any-return]


@functools.cache
def _read() -> dict[str, dict[str, list[str]]]:
    kinds: dict[str, dict[str, list[str]]] = {}
    for name in _FILES:
        kinds.update(json.loads((_FOLDER / name).read_text("utf-8")))
    return kinds


def all_wordings() -> list[tuple[str, str, Wording]]:
    """List kind, language and wording of all there are."""
    return [
        (kind, language, _parse(line))
        for kind, languages in _read().items()
        for language, lines in languages.items()
        for line in lines
    ]


def _parse(line: str) -> Wording:
    lead, mark, ask = line.partition("|||")
    return Wording(lead.strip(), ask.strip()) if mark else Wording("", line.strip())


def choose(
    rng: random.Random, kind: str, language: str, precede: bool = False, follow: bool = True
) -> Wording:
    """Draw a wording that fits where it is to stand."""
    fitting = [
        wording
        for wording in wordings(kind, language)
        if (not precede or wording.may_precede) and (not follow or wording.may_follow)
    ]
    return rng.choice(fitting or list(wordings(kind, language)))
