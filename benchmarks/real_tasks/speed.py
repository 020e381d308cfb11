"""Time to the first token and time a token, of the server that also answers the tasks."""

import itertools
import keyword
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks.real_tasks.engine import ServedEngine
from benchmarks.real_tasks.needles import hay
from benchmarks.real_tasks.samples import Encoder
from benchmarks.real_tasks.variants import SERVED_NAME
from benchmarks.timed_answers import Arrivals, came_in_a_burst, first_and_next_ms, time_answers

OUTPUT_TOKENS: Final = 128
_QUESTION: Final = (
    "\n\nQuestion: what does the text above say of `{}`, and in which section does it?\nAnswer:"
)
WAVES: Final = 2
"""At least, of as many requests as run at once."""


@dataclass(frozen=True, slots=True)
class SpeedCases:
    """What is timed: every length with every number of requests."""

    lengths: tuple[int, ...]
    """Prompt tokens."""
    concurrency: tuple[int, ...]
    """Requests in flight."""
    prompts: int
    """Timed ones of each combination at least, in whole waves."""


ShareOf = Callable[[Sequence[list[int]]], float | None]
"""Tells prompts' mean share of SPARSE layers; None where nothing is routed."""


def time_engine(
    engine: ServedEngine, encoder: Encoder, cases: SpeedCases, title: str, share_of: ShareOf
) -> list[dict[str, Any]]:
    """Stream answers to questions on real text, so many at once, after as many untimed ones.

    Every prompt has exactly the case's length and ends with a question of its own: a router would
    take text that is only to be gone on with for local.

    Requests come in waves: all of one begin together, so that every first token is one of a burst
    of that size. (Were each to begin when another ends, a faster engine's would wait behind more
    prefills, and its median first token would say nothing of its speed.)

    Args:
        engine: nothing else may ask it, nor use its GPU.
        encoder: of the model.
        cases: what is timed.
        title: of the progress bars.
        share_of: asked about the timed prompts, once they are timed.

    Returns: a row of each combination.
    """
    text = encoder.text_tokens(hay())
    subjects = sorted(keyword.kwlist)
    rows = []
    for length, at_once in itertools.product(cases.lengths, cases.concurrency):
        waves = max(WAVES, math.ceil(cases.prompts / at_once))
        count = waves * at_once
        starts = np.linspace(0, len(text) - length, at_once + count).astype(int).tolist()
        bodies = []
        for start, subject in zip(starts, itertools.cycle(subjects), strict=False):
            asked = encoder.text_tokens(_QUESTION.format(subject))
            bodies.append(_body(text[start : start + length - len(asked)] + asked))
        name = f"{title}, {length} tokens, {at_once} at once"
        arrived = time_answers(f"{engine.url}/v1", bodies, at_once, at_once, name, in_waves=True)
        times = [first_and_next_ms(answer, OUTPUT_TOKENS) for answer in arrived]
        rows.append(
            {
                "prompt_tokens": length,
                "at_once": at_once,
                "prompts": count,
                "output_tokens": OUTPUT_TOKENS,
                "sparse_share": share_of([body["prompt"] for body in bodies[at_once:]]),
                "ttft_ms": _spread([first for first, _ in times]),
                "token_ms": _spread([next_ for _, next_ in times]),
                "requests_s": _spread(
                    [
                        1e3 * at_once / _last_ms(arrived[at : at + at_once])
                        for at in range(0, count, at_once)
                    ]
                ),
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


def _last_ms(wave: Sequence[Arrivals]) -> float:
    """Return when the last token of a wave came."""
    return max(arrived[-1][0] for arrived in wave)


def _spread(values: list[float]) -> dict[str, Any]:
    low, median, high = np.percentile(values, [10, 50, 90])
    return {
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "values": [round(value, 3) for value in values],
    }
