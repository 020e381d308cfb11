"""Engines measured in turns, and by how much one takes longer than others in the same turn."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Engine = TypeVar("Engine")


def in_turns(
    engines: Mapping[str, Engine], measure: Callable[[Engine], float], turns: int, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Measure engines one after another; each turn begins with the next of them.

    Args:
        engines: by name.
        measure: one engine, once.
        turns: that count.
        warm_ups: turns before them.

    Returns: by engine, a value a turn.
    """
    values: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for turn in range(turns + warm_ups):
        first = turn % len(names)
        # There and back would measure the first and the last twice in a row: still warm.
        for name in (*names[first:], *names[:first]):
            value = measure(engines[name])
            if turn >= warm_ups:
                values[name].append(value)
    return values


def longer_percent(
    values: Sequence[float], others: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """Return by how many per cent values exceed others of the same turn: median, interval."""
    percent = [100 * (v / o - 1) for v, o in zip(values, others, strict=True)]
    return statistics.median(percent), interval(percent)


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Bootstrap a 95 % interval of the median."""
    generator = random.Random(0)
    medians = sorted(
        statistics.median(generator.choices(values, k=len(values))) for _ in range(draws)
    )
    return medians[round(0.025 * draws)], medians[round(0.975 * draws)]
