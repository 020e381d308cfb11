"""Runs of thirteen words that prompts share with texts kept for evaluation."""

import json
import re
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

WORDS = 13
_forbidden: list[set[str]] = []
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")


def word_runs(text: str) -> Iterator[str]:
    """Give every run of thirteen words, lower-case; a Chinese character is a word."""
    words = _WORD.findall(text.lower())
    for at in range(len(words) - WORDS + 1):
        yield " ".join(words[at : at + WORDS])


def texts_in(value: Any) -> Iterator[str]:
    """Give every string in JSON, wherever it stands."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def evaluation_runs(folder: Path) -> set[str]:
    """Read the runs of all JSON lines in a folder, whatever their fields.

    Raises: FileNotFoundError: the folder holds none.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"expected .jsonl files in {folder}, found none; give the folder of evaluation files"
        )
    return {
        run
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
        for text in texts_in(json.loads(line))
        for run in word_runs(text)
    }


def shared_run(row: dict[str, Any], forbidden: set[str]) -> str:
    """Return the first run of a prompt that evaluation texts hold too, or nothing."""
    for text in texts_in([row.get("messages"), row.get("prompt")]):
        for run in word_runs(text):
            if run in forbidden:
                return run
    return ""


def split_by_leaks(
    rows: list[dict[str, Any]], forbidden: set[str], workers: int = 1
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Drop the prompts that share a run with evaluation texts; nothing is excepted.

    Args:
        rows: of `messages` or `prompt`.
        forbidden: `evaluation_runs`.
        workers: processes that look; 1: this one.

    Returns: the rows that stay; id and shared run of the others.
    """
    if workers == 1:
        found = [shared_run(row, forbidden) for row in rows]
    else:
        # Forked processes inherit the set, which is too large to be handed over row by row.
        _forbidden[:] = [forbidden]
        with get_context("fork").Pool(workers) as pool:
            found = pool.map(_inherited_shared_run, rows, chunksize=32)
    kept = [row for row, run in zip(rows, found, strict=True) if not run]
    dropped = [(row["id"], run) for row, run in zip(rows, found, strict=True) if run]
    return kept, dropped


def _inherited_shared_run(row: dict[str, Any]) -> str:
    return shared_run(row, _forbidden[0])


def leaking_wordings(wordings: Iterable[str], forbidden: set[str]) -> list[str]:
    """List the wordings that share a run with evaluation texts."""
    return [words for words in wordings if any(run in forbidden for run in word_runs(words))]
