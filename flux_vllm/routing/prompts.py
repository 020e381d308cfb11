"""Which requests are probed in a step, told from token counts on the host.

A route matters once a context is longer than the sinks and the window together, S + W tokens: up
to there SPARSE sees what FULL sees. So a prompt longer than that is probed in the step of its
first chunk, a shorter one in the step in which its context outgrows it, and many never.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's prompt, as the scheduler announces it to the worker."""

    request_id: str
    length: int
    """Tokens."""
    tokens: Sequence[int] | None
    """Its token ids; None where some of it is not token ids (embeddings, images)."""
    adapter: object | None = None
    """vLLM's LoRARequest; None for the model as it is."""


class OpenPrompts:
    """The prompts whose routes are still to be decided.

    A short prompt may stay open for a thousand steps, so it is not looked at in each of them: a
    step adds only so many tokens to a request, which says when it can fall due at the earliest.

    Args:
        reach: S + W tokens, up to which routes do not matter.
        step_tokens: the most that a step adds to what is known of a request, drafts included.
    """

    def __init__(self, reach: int, step_tokens: int = 1) -> None:
        self._reach = reach
        self._step_tokens = step_tokens
        self._prompts: dict[str, Prompt] = {}
        self._first_steps: dict[str, int] = {}
        self._steps = 0
        self._next_check = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, prompt: Prompt) -> None:
        """Take up a prompt; one of the same request takes the place of an older."""
        name = prompt.request_id
        first_step = self._steps + 1 + (self._reach - prompt.length) // self._step_tokens
        # Announced again after a preemption, a request has more tokens than its prompt.
        first_step = min(first_step, self._first_steps.get(name, first_step))
        self._prompts[name] = prompt
        self._first_steps[name] = first_step
        self._next_check = min(self._next_check, first_step)

    def discard(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended; unknown ones are passed over."""
        for request_id in request_ids:
            if self._prompts.pop(request_id, None) is not None:
                del self._first_steps[request_id]

    def begin_step(self) -> bool:
        """Count a step. Returns: whether a prompt may fall due in it."""
        self._steps += 1
        return bool(self._prompts) and self._steps >= self._next_check

    def take_due(self, context_ends: Mapping[str, int]) -> list[Prompt]:
        """Take out the prompts whose routes matter in a step.

        Args:
            context_ends: of each request of the step, its tokens once the step is done.

        Returns: the prompts, in the order in which they came.
        """
        due = [
            prompt
            for name, prompt in self._prompts.items()
            if name in context_ends and max(prompt.length, context_ends[name]) > self._reach
        ]
        self.discard(prompt.request_id for prompt in due)
        self._next_check = min(self._first_steps.values(), default=0)
        return due
