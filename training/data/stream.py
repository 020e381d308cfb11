"""An endless, addressable stream of prompts: prompt i is a function of the seed, split and i.

Nothing but the index is remembered, so a resumed run sees exactly the prompts it would have seen.
"""

import math
import random
import warnings
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from training.config import DataSettings
from training.data.encoding import Encoded, Wrapper, encode, token_counter
from training.data.families import get_families
from training.data.sample import Request, Sample, TaskFamily
from training.data.text import (
    Split,
    TextSource,
    collect,
    default_sources,
    read_corpus,
    split_documents,
)

_UNBALANCED = 2.0


class PromptStream(Dataset[Encoded]):
    """Prompts of one split.

    Args:
        settings: mix, lengths, wrappers.
        tokenizer: the model's.
        split: of text, wording and seeds.
        seed: of the stream.
        held_out_wording: paraphrases that training never shows.
        max_model_tokens: the model's own limit; prompts stay below it.
        same_length: so many prompts in a row are of one length, which saves padding.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Any,
        split: Split,
        seed: int,
        held_out_wording: bool = False,
        max_model_tokens: int | None = None,
        same_length: int = 1,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.split = split
        self.seed = seed
        self.held_out_wording = held_out_wording
        self.same_length = same_length
        self.max_model_tokens = max_model_tokens or settings.max_tokens
        if not settings.tasks:
            raise ValueError(
                "expected task families to make prompts of, found none; name them with --data.tasks"
            )
        self.tasks: list[TaskFamily] = [*get_families(settings.tasks)]
        self.text = _load_text(settings, tokenizer, split)
        self.weights = list(settings.weights) + [1.0] * (len(self.tasks) - len(settings.weights))
        warn_if_unbalanced(dict(zip(self.task_names, self.weights, strict=True)))

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks in the mix."""
        return [task.name for task in self.tasks]

    def __getitem__(self, index: int) -> Encoded:
        """Make prompt `index`; tasks take turns as their weights say."""
        rng = self._rng(index)
        task = self._task_at(index)
        low, high = math.log(self.settings.min_tokens), math.log(self.settings.max_tokens)
        run = random.Random(f"{self.seed}/{self.split}/length/{index // self.same_length}")
        tokens = int(math.exp(run.uniform(low, high)))
        wrapper: Wrapper = rng.choice(self.settings.wrappers)  # type: ignore[arg-type]
        return self.make(task, tokens, wrapper, rng)

    def make(self, task: TaskFamily, tokens: int, wrapper: Wrapper, rng: random.Random) -> Encoded:
        """Make one prompt of a task and length."""
        return self.make_both(task, tokens, wrapper, rng)[1]

    def make_both(
        self, task: TaskFamily, tokens: int, wrapper: Wrapper, rng: random.Random
    ) -> tuple[Sample, Encoded]:
        """Make one prompt of a task and length, as text and as tokens.

        Raises: ValueError: the task makes none that fits the model.
        """
        most = max(self.settings.max_answer_tokens, tokens if task.short_prompt else 0)
        is_open = rng.random() < self.settings.open_fraction
        for _ in range(8):
            sample = self.sample(task, tokens, rng)
            sample = sample.opened() if is_open else sample
            encoded = encode(sample, wrapper, self.tokenizer, most)
            if len(encoded) <= self.max_model_tokens:
                return sample, encoded
            tokens = int(tokens * 0.95 * self.max_model_tokens / len(encoded))
        raise ValueError(
            f"expected a prompt of {task.name} within {self.max_model_tokens} tokens, found "
            f"{len(encoded)}; lower --data.max_tokens"
        )

    def sample(self, task: TaskFamily, tokens: int, rng: random.Random) -> Sample:
        """Make one prompt as text."""
        return task.make(Request(rng, self.text, tokens, self.held_out_wording))

    def _rng(self, index: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.split}/{index}")

    def _task_at(self, index: int) -> TaskFamily:
        if len(set(self.weights)) == 1:
            turn, place = divmod(index, len(self.tasks))
            order = random.Random(f"{self.seed}/{self.split}/turn/{turn}")
            return order.sample(self.tasks, len(self.tasks))[place]
        rng = random.Random(f"{self.seed}/{self.split}/task/{index}")
        return rng.choices(self.tasks, weights=self.weights)[0]


def _load_text(settings: DataSettings, tokenizer: Any, split: Split) -> TextSource:
    if settings.corpus:
        documents = read_corpus(Path(settings.corpus))
    else:
        documents = collect(default_sources())
    return TextSource(split_documents(documents, split), token_counter(tokenizer))


def warn_if_unbalanced(weights: dict[str, float]) -> None:
    """Warn of a mix in which one task is drawn more than twice as often as another."""
    most, least = max(weights.values()), min(weights.values())
    if most > _UNBALANCED * least:
        warnings.warn(
            "the mix of tasks is unbalanced, which makes the routes of all tasks alike: "
            + ", ".join(f"{name} {weight:g}" for name, weight in weights.items()),
            stacklevel=2,
        )
