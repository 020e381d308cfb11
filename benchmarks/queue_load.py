"""A server's full queue: requests answered in a stretch in which memory lets no more of them in."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_SETTLED_STEPS = 8
"""Steps without a prompt in them and without a new request, after which memory counts as full."""
_WAITING = 2
"""Requests that are kept waiting."""


@dataclass
class QueueLoad:
    """Runs a queue on an engine that is stepped in this process.

    Args:
        core: vLLM's LLMEngine.
        scheduler: its scheduler.
        add: adds a request.
    """

    core: Any
    scheduler: Any
    add: Callable[[], None]
    steps: list[tuple[int, float, int, bool]] = field(default_factory=list)
    """Of each step: tokens given out, seconds, requests running, whether a prompt was in it."""

    def run(self, seconds: float) -> dict[str, float]:
        """Fill the memory, then answer as many requests as fit at once, or until time is over.

        Args:
            seconds: most that both may take.

        Returns: `most_running` requests at once and `fill_seconds` until then. Of the steps since:
            `mean_running`, `seconds`, `tokens_per_second`, `generations` (requests that ended for
            each that ran at the beginning; 1 is a whole turn of prompts and answers). Of those
            among all steps that had no prompt in them and nearly the most rows:
            `decode_tokens_per_second`, `decode_step_ms`. And `preemptions`.
        Raises: RuntimeError: memory was not full in time.
        """
        begin = time.perf_counter()
        preemptions = count_preemptions(self.scheduler)
        first = ended = filled = calm = 0
        while not first or ended < first:
            if time.perf_counter() - begin > seconds:
                break
            while len(self.scheduler.waiting) < _WAITING:
                self.add()
            ended += self._step()
            if first:
                continue
            ended = 0
            is_calm = len(self.steps) > 1 and self.steps[-1][2:] == self.steps[-2][2:]
            calm = calm + 1 if is_calm and not self.steps[-1][3] else 0
            if calm == _SETTLED_STEPS:
                first, filled = len(self.scheduler.running), len(self.steps)
        if not first:
            raise RuntimeError(
                f"expected full memory within {seconds:g} s, found {len(self.scheduler.running)} "
                "requests running and room for more; give more time or a smaller KV cache"
            )
        return self._result(first, filled, ended) | {"preemptions": len(preemptions)}

    def _step(self) -> int:
        """Run a step. Returns: requests that ended in it."""
        running = self.scheduler.running
        has_prompt = any(r.num_computed_tokens < r.num_prompt_tokens for r in running)
        begin = time.perf_counter()
        outputs = self.core.step()
        taken = time.perf_counter() - begin
        self.steps.append((len(outputs), taken, len(self.scheduler.running), has_prompt))
        return sum(output.finished for output in outputs)

    def _result(self, first: int, filled: int, ended: int) -> dict[str, float]:
        since = self.steps[filled:]
        seconds = sum(step[1] for step in since)
        most = max(step[2] for step in self.steps)
        decode = [step for step in self.steps if not step[3] and step[0] >= 0.9 * most]
        tokens, taken = sum(step[0] for step in decode), sum(step[1] for step in decode)
        return {
            "most_running": most,
            "fill_seconds": sum(step[1] for step in self.steps[:filled]),
            "mean_running": sum(step[1] * step[2] for step in since) / seconds if since else first,
            "seconds": seconds,
            "tokens_per_second": sum(step[0] for step in since) / seconds if since else 0.0,
            "generations": ended / first,
            "decode_tokens_per_second": tokens / taken if decode else 0.0,
            "decode_step_ms": 1000 * taken / len(decode) if decode else 0.0,
        }


def count_preemptions(scheduler: Any) -> list[str]:
    """Note from now on which requests a scheduler preempts: their ids, in the list returned."""
    preempt, names = scheduler._preempt_request, []

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return names
