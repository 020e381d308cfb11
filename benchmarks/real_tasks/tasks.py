"""The families of tasks: which samples each has, and how they are asked."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.real_tasks.needles import make_needles
from benchmarks.real_tasks.samples import Sample, read_samples

FAMILIES: Final = ("longbench", "needles", "prompts", "chains", "gsm8k_list", "gsm8k")
"""In the order in which they are asked: those first whose answers other engines wait for."""
COMPARED: Final = ("longbench", "needles", "prompts", "chains", "gsm8k_list")
"""Families in which agreement with full attention is measured. GSM8K's prompts are too short for
routes to matter."""

_LISTED: Final = 80
"""Problems of a list, some 5,200 tokens."""
_LISTS: Final = 100
"""Such prompts."""
_FIRST_WORDS: Final = 8
"""Of a problem: by its number alone the models at hand find another one."""
_STEP_BY_STEP = "Think step by step. End with a line that holds the result alone, as a number."
_THREE_WAYS = (
    "Solve this in three different ways. In each, explain every step at length, say why it is "
    "right and which mistakes one could make. End each way with a line `Result: NUMBER`. Then "
    "compare the three, check each step of each once more by a calculation of its own, and write "
    "a long account of it for a student who knows nothing yet."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Where samples come from, and how many."""

    folder: Path
    """With `longbench_SPLIT.jsonl` and `gsm8k_SPLIT.jsonl`."""
    split: str = "dev"
    needles: int = 40
    needle_tokens: tuple[int, int] = (3000, 28000)
    """Of the shortest and the longest."""
    needle_file: Path | None = None
    """Made before; None: made anew."""
    prompts: Path | None = None
    """Further real prompts, for agreement alone."""
    prompt_new_tokens: int = 64
    """Of an answer to these, where the file does not say."""
    chains: int = 16
    chain_new_tokens: tuple[int, int] = (2000, 2560)
    """Least and most of a chain of thought."""
    limit: int | None = None
    """Of samples a task, for a trial."""


def load(family: str, options: TaskOptions) -> list[Sample]:
    """Return a family's samples.

    Raises: ValueError: an unknown family, or one whose file is not given.
    """
    samples = _load(family, options)
    if options.limit is None:
        return samples
    seen: dict[str, int] = {}
    kept = []
    for sample in samples:
        seen[sample.task] = seen.get(sample.task, 0) + 1
        if seen[sample.task] <= options.limit:
            kept.append(sample)
    return kept


def _load(family: str, options: TaskOptions) -> list[Sample]:
    if family == "longbench":
        return read_samples(options.folder / f"longbench_{options.split}.jsonl")
    if family == "needles":
        if options.needle_file is not None:
            return read_samples(options.needle_file)
        return make_needles(options.needles, *options.needle_tokens)
    if family == "prompts":
        if options.prompts is None:
            raise ValueError("expected --prompts FILE with the task family prompts, found none")
        return read_samples(options.prompts, options.prompt_new_tokens)
    questions = read_samples(options.folder / f"gsm8k_{options.split}.jsonl")
    if family == "gsm8k":
        return [
            dataclasses.replace(one, prompt=f"{one.prompt}\n\n{_STEP_BY_STEP}") for one in questions
        ]
    if family == "gsm8k_list":
        return [_in_a_list(one, questions) for one in questions[:_LISTS]]
    if family == "chains":
        least, most = options.chain_new_tokens
        return [
            dataclasses.replace(
                one,
                task="chain_of_thought",
                id=f"chain_of_thought-{one.id}",
                prompt=f"{one.prompt}\n\n{_THREE_WAYS}",
                min_new_tokens=least,
                max_new_tokens=most,
            )
            for one in questions[-options.chains :]
        ]
    raise ValueError(f"expected a task family among {list(FAMILIES)}, found {family!r}")


def _in_a_list(one: Sample, questions: Sequence[Sample]) -> Sample:
    """Ask a problem by number and first words in a list: reasoning over what stands far away."""
    rng = random.Random(one.id)
    others = [other for other in questions if other.id != one.id]
    listed = rng.sample(others, min(_LISTED - 1, len(others)))
    number = rng.randint(1, len(listed) + 1)
    listed.insert(number - 1, one)
    problems = "\n\n".join(f"Problem {at}. {each.prompt}" for at, each in enumerate(listed, 1))
    begin = " ".join(one.prompt.split()[:_FIRST_WORDS])
    asked = f'Solve problem {number} of this list, which begins "{begin}", and no other.'
    return dataclasses.replace(
        one,
        task="gsm8k_list",
        id=f"gsm8k_list-{one.id}",
        prompt=f"{problems}\n\n{asked} {_STEP_BY_STEP}",
    )
