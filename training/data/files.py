"""Prompts from JSONL and Parquet files."""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.sample import Sample
from training.data.text import Split


@dataclass(frozen=True, slots=True)
class FileTask:
    """The rows of one task."""

    name: str
    samples: list[Sample]

    def draw(self, rng: random.Random) -> Sample:
        """Draw one row."""
        return rng.choice(self.samples)


def read_files(paths: Iterable[Path], split: Split) -> list[FileTask]:
    """Read rows of `messages` or `prompt`/`answer`, grouped by their `task`.

    Args:
        paths: `.jsonl` or `.parquet` files; rows are split by a hash of their prompt.
        split: the rows to keep.

    Returns: one FileTask a task name.
    Raises: ValueError: a row without the fields, another suffix, or a task without rows.
    """
    tasks: dict[str, list[Sample]] = {}
    for path in paths:
        for number, row in enumerate(_rows(path), start=1):
            sample = _sample(row, f"{path}, row {number}")
            kept = tasks.setdefault(sample.task, [])
            if _split_of(sample) == split:
                kept.append(sample)
    empty = sorted(name for name, samples in tasks.items() if not samples)
    if empty or not tasks:
        raise ValueError(
            f"expected rows of every task in the {split} split, found none of {empty or 'any'}; "
            "give more rows"
        )
    return [FileTask(name, samples) for name, samples in sorted(tasks.items())]


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    if path.suffix == ".parquet":
        try:
            from datasets import load_dataset  # type: ignore[import-untyped]
        except ImportError as error:
            raise ValueError(
                f"expected the package `datasets` to read {path}, found none; install the extra "
                "`train`"
            ) from error
        return load_dataset("parquet", data_files=str(path), split="train")  # type: ignore[no-any-return]
    raise ValueError(f"expected a .jsonl or .parquet file, found {path}; convert it")


def _sample(row: dict[str, Any], where: str) -> Sample:
    task = row.get("task")
    if row.get("messages"):
        *earlier, last = row["messages"]
        answer = last["content"] if last.get("role") == "assistant" else None
        prompt: Any = "\n\n".join(str(turn["content"]) for turn in earlier)
    else:
        prompt, answer = row.get("prompt"), row.get("answer")
    if not task or not prompt or not answer:
        raise ValueError(
            f"{where}: expected `task` and either `messages` that end with the assistant's or "
            f"`prompt` and `answer`, found the fields {sorted(row)}; complete the row"
        )
    return Sample(task=str(task), context="", question=str(prompt), answer=str(answer))


def _split_of(sample: Sample) -> Split:
    bucket = int(hashlib.sha256(sample.question.encode()).hexdigest()[:8], 16) % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"
