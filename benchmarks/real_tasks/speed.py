"""Time to the first token and time a token, of the server that also answers the tasks."""

import itertools
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks.real_tasks.engine import ServedEngine
from benchmarks.real_tasks.needles import hay
from benchmarks.real_tasks.samples import Encoder
from benchmarks.real_tasks.variants import SERVED_NAME
from benchmarks.timed_answers import came_in_a_burst, first_and_next_ms, time_answers

OUTPUT_TOKENS: Final = 128
ROUNDS: Final = 2
"""Of as many requests as run at once, at least."""


@dataclass(frozen=True, slots=True)
class SpeedCases:
    """What is timed: every length with every number of requests."""

    lengths: tuple[int, ...]
    """Prompt tokens."""
    concurrency: tuple[int, ...]
    """Requests in flight."""
    prompts: int
    """Timed ones of each combination; `ROUNDS` times those in flight at least."""


def time_engine(
    engine: ServedEngine, encoder: Encoder, cases: SpeedCases, title: str
) -> list[dict[str, Any]]:
    """Stream answers to real text of each length, so many at once, after as many untimed ones.

    Args:
        engine: nothing else may ask it, nor use its GPU.
        encoder: of the model.
        cases: what is timed.
        title: of the progress bars.

    Returns: a row of each combination.
    """
    text = encoder.text_tokens(hay())
    rows = []
    for length, at_once in itertools.product(cases.lengths, cases.concurrency):
        count = max(cases.prompts, ROUNDS * at_once)
        starts = np.linspace(0, len(text) - length, at_once + count).astype(int).tolist()
        bodies = [_body(text[start : start + length]) for start in starts]
        name = f"{title}, {length} tokens, {at_once} at once"
        arrived = time_answers(f"{engine.url}/v1", bodies, at_once, at_once, name)
        times = [first_and_next_ms(answer, OUTPUT_TOKENS) for answer in arrived]
        rows.append(
            {
                "prompt_tokens": length,
                "at_once": at_once,
                "prompts": count,
                "output_tokens": OUTPUT_TOKENS,
                "ttft_ms": _spread([first for first, _ in times]),
                "token_ms": _spread([next_ for _, next_ in times]),
                "bursts": sum(came_in_a_burst(answer) for answer in arrived),
            }
        )
    return rows


def _body(token_ids: list[int]) -> dict[str, Any]:
    return {
        "model": SERVED_NAME,
        "prompt": token_ids,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }


def _spread(values: list[float]) -> dict[str, Any]:
    low, median, high = np.percentile(values, [10, 50, 90])
    return {
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "values": [round(value, 3) for value in values],
    }
