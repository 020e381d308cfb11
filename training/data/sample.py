"""What a task family makes, and what is known about each family."""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from training.data.text import TextSource

Group = Literal["retrieval", "local", "in_context", "reasoning"]
Metric = Literal["exact", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt and the answer to it."""

    task: str
    context: str
    """The long text, which comes first; empty where the question is all there is."""
    question: str
    answer_prefix: str = ""
    """Words the assistant's turn begins with; starts and ends without a space."""
    answer: str
    """Follows the prefix; what losses and scores look at."""
    is_open: bool = False
    """Whether the prefix is part of the answer; otherwise the prompt ends with it."""
    instruction_first: bool = False
    """Whether the question also stands before the context."""
    details: dict[str, object] = field(default_factory=dict)

    @property
    def user_text(self) -> str:
        """The user's turn."""
        parts = [self.question] if self.instruction_first and self.context else []
        parts += [self.context] if self.context else []
        return "\n\n".join([*parts, self.question])

    def opened(self) -> "Sample":
        """Return the same question with the answer's prefix as part of the answer."""
        answer = self.answer if self.answer_prefix else self.answer.lstrip(" ")
        return dataclasses.replace(self, is_open=True, answer=answer)


@dataclass(frozen=True, slots=True)
class Request:
    """What a family is asked to make."""

    rng: random.Random
    """The sample's own generator; the only source of chance."""
    text: TextSource
    tokens: int
    """Length to aim at, prompt and answer together."""
    held_out_wording: bool = False
    """Use paraphrases that training never shows."""

    def wording(self, trained: list[str], held_out: list[str]) -> str:
        """Choose one way to say it."""
        return self.rng.choice(held_out if self.held_out_wording else trained)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFamily:
    """One kind of task."""

    name: str
    group: Group
    metric: Metric
    """`exact`: all answer tokens right (what greedy decoding needs); `tokens`: share of them."""
    target_share: float
    """Share of SPARSE layers to train for, unless the recipe says otherwise."""
    make: Callable[[Request], Sample]
    short_prompt: bool = False
    """The length lies in the answer: the prompt has no context and stays short whatever length is
    asked for."""
