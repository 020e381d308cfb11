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

    Args:
        reach: S + W tokens, up to which routes do not matter.
    """

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._prompts: dict[str, Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, prompt: Prompt) -> None:
        """Take up a prompt; one of the same request takes the place of an older."""
        self._prompts[prompt.request_id] = prompt

    def discard(self, request_ids: Iterable[str]) -> None:
        """Forget requests that ended; unknown ones are passed over."""
        for request_id in request_ids:
            self._prompts.pop(request_id, None)

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
        return due
