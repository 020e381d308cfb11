"""Held-out prompts by task and length."""

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from training.config import DataSettings, EvalConfig
from training.data.encoding import Encoded, Wrapper, encode, render
from training.data.local import ask_for_last_words
from training.data.sample import Sample, TaskFamily
from training.data.stream import PromptStream
from training.data.text import Split
from training.evaluation.scoring import group_of, metric_of
from training.evaluation.statistics import Cells
from training.model_loading import load_tokenizer, model_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSetting:
    """Which prompts to make."""

    split: Split
    seed: int
    lengths: tuple[int, ...]
    prompts: int
    """Prompts a task and length."""
    wrapper: Wrapper = "chat"
    begun: bool = False
    """The prompt ends with the answer's prefix; otherwise all prompts are open."""
    held_out_wording: bool = False
    same_context: bool = False
    """The context comes first in every prompt, so that two questions can share it; tasks of short
    prompts have none and are left out."""
    ask_locally: bool = False
    """Put a local question in the place of each prompt's own."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts and the cells they belong to."""

    prompts: list[Encoded]
    lengths: list[int]
    """Length bucket of each prompt."""

    @property
    def cells(self) -> Cells:
        """Group by task and length."""
        return Cells([prompt.task for prompt in self.prompts], self.lengths)


class _Prompts(Dataset[Encoded]):
    def __init__(self, stream: PromptStream, tasks: list[TaskFamily], setting: PromptSetting):
        self.stream = stream
        self.setting = setting
        self.keys = [
            (task, length, index)
            for task in tasks
            for length in setting.lengths
            for index in range(setting.prompts)
        ]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, at: int) -> Encoded:
        task, length, index = self.keys[at]
        setting = self.setting
        key = _key(setting.seed, setting.split, task.name, length, index)
        if not setting.same_context:
            return self.stream.make(task, length, setting.wrapper, random.Random(key))
        sample: Sample = self.stream.sample(task, length, random.Random(key))
        sample = dataclasses.replace(sample, instruction_first=False)
        if setting.ask_locally:
            sample = ask_for_last_words(sample)
        sample = sample if setting.begun else sample.opened()
        limit = self.stream.settings.max_answer_tokens
        return encode(sample, setting.wrapper, self.stream.tokenizer, limit)


def make_prompts(
    data: DataSettings,
    tokenizer: Any,
    setting: PromptSetting,
    max_model_tokens: int,
    groups: tuple[str, ...] = (),
) -> PromptSet:
    """Make the prompts of all tasks and lengths.

    Args:
        data: tasks, text, workers.
        tokenizer: the model's.
        setting: which prompts.
        max_model_tokens: the model's limit.
        groups: keep tasks of these groups; empty keeps all.

    Returns: PromptSet, ordered by task, length and index.
    Raises: ValueError: no task is left.
    """
    data = dataclasses.replace(data, open_fraction=0.0 if setting.begun else 1.0)
    stream = PromptStream(
        data, tokenizer, setting.split, setting.seed, setting.held_out_wording, max_model_tokens
    )
    tasks = [
        task
        for task in stream.tasks
        if isinstance(task, TaskFamily)
        and (not groups or task.group in groups)
        and not (setting.same_context and task.short_prompt)
    ]
    if not tasks:
        context = ", with a context" if setting.same_context else ""
        raise ValueError(
            f"expected a built-in task of {groups or 'any group'}{context}, found "
            f"{stream.task_names}; correct --data.tasks or --variants"
        )
    prompts = _Prompts(stream, tasks, setting)
    loader = DataLoader(
        prompts, batch_size=16, num_workers=data.workers, collate_fn=list, shuffle=False
    )
    made = [prompt for batch in loader for prompt in batch]
    return PromptSet(made, [length for _, length, _ in prompts.keys])


def write_prompts(config: EvalConfig) -> Path:
    """Write the held-out prompts of an evaluation, to ask a server the same.

    Rows are in the order in which an evaluation scores them. They hold `task`, `group`, `metric`,
    `length`; as text `prompt` (chat wrapper included, open), `prefix`, `answer`; and what is
    scored: `token_ids` (prompt, prefix, answer), `prompt_len`, `prefix_len`, `shared_len`. A
    server's free answer may begin otherwise than by the prefix: force it, as scoring does.

    The variant `cached` adds `cached.jsonl`: retrieval questions whose context leads the prompt,
    each with `before`, a local question on the same context.

    Returns: path of the JSONL file.
    """
    tokenizer = load_tokenizer(config.model)
    limit = model_limit(config.model)
    data = dataclasses.replace(config.data, open_fraction=1.0)
    stream = PromptStream(data, tokenizer, "test", config.seed, max_model_tokens=limit)
    wrapper: Wrapper = config.data.wrappers[0]  # type: ignore[assignment]
    path = Path(config.out) / "prompts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for task in stream.tasks:
            for length in config.lengths:
                for index in range(config.prompts):
                    rng = random.Random(_key(config.seed, "test", task.name, length, index))
                    sample, encoded = stream.make_both(task, length, wrapper, rng)
                    row = {
                        "prompt": render(sample, wrapper, tokenizer),
                        "prefix": sample.answer_prefix,
                        "answer": sample.answer,
                    }
                    file.write(json.dumps(_row(encoded, length) | row) + "\n")
    if "cached" in config.variants:
        _write_cached(config, tokenizer, limit, path.with_name("cached.jsonl"))
    return path


def _write_cached(config: EvalConfig, tokenizer: Any, limit: int, path: Path) -> None:
    setting = PromptSetting(
        split="test",
        seed=config.seed,
        lengths=config.lengths,
        prompts=config.variant_prompts,
        wrapper=config.data.wrappers[0],  # type: ignore[arg-type]
        same_context=True,
    )
    asked, before = (
        make_prompts(config.data, tokenizer, chosen, limit, groups=("retrieval",))
        for chosen in (setting, dataclasses.replace(setting, ask_locally=True))
    )
    with path.open("w", encoding="utf-8") as file:
        for prompt, earlier, length in zip(
            asked.prompts, before.prompts, asked.lengths, strict=True
        ):
            row = _row(prompt, length) | {"before": _row(earlier, length)}
            file.write(json.dumps(row) + "\n")


def read_prompts(path: Path) -> tuple[PromptSet, list[Encoded]]:
    """Read what `write_prompts` wrote.

    Returns: the prompts, and of `cached.jsonl` what is asked before each; of others nothing.
    Raises: ValueError: the file holds no such rows.
    """
    prompts, lengths, before = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        missing = sorted({"length", *_ENCODED} - row.keys())
        if missing:
            raise ValueError(
                f"{path}, line {number}: expected a row of `python -m training prompts`, found one "
                f"without {missing}; write the file anew"
            )
        prompts.append(_encoded(row))
        lengths.append(row["length"])
        if "before" in row:
            before.append(_encoded(row["before"]))
    if not prompts or len(before) not in (0, len(prompts)):
        raise ValueError(
            f"{path}: expected prompts, all or none with `before`, found {len(prompts)} of which "
            f"{len(before)} have it; write the file anew with `python -m training prompts`"
        )
    return PromptSet(prompts, lengths), before


_ENCODED = [field.name for field in dataclasses.fields(Encoded)]


def _row(prompt: Encoded, length: int) -> dict[str, Any]:
    fields = {name: getattr(prompt, name) for name in _ENCODED}
    return fields | {
        "token_ids": prompt.token_ids.tolist(),
        "group": group_of(prompt.task),
        "metric": metric_of(prompt.task),
        "length": length,
    }


def _encoded(row: dict[str, Any]) -> Encoded:
    fields = {name: row[name] for name in _ENCODED}
    return Encoded(**fields | {"token_ids": np.array(row["token_ids"], dtype=np.int32)})


def _key(seed: int, split: Split, task: str, length: int, index: int) -> str:
    return f"{seed}/{split}/{task}/{length}/{index}"
