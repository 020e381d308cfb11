"""Means over tasks and lengths, and their paired bootstrap intervals."""

from collections.abc import Sequence

import numpy as np

from training.evaluation.scoring import group_of

JUDGED_GROUPS = ("retrieval", "local")
"""The groups whose means weigh equally in the mean score."""


class Cells:
    """Prompts by task and length, for means in which every cell weighs the same.

    Args:
        tasks: [P] task of each prompt.
        lengths: [P] length bucket of each prompt.
    """

    def __init__(self, tasks: Sequence[str], lengths: Sequence[int]) -> None:
        self.rows: dict[tuple[str, int], np.ndarray] = {}
        for row, key in enumerate(zip(tasks, lengths, strict=True)):
            self.rows.setdefault(key, np.array([], dtype=np.int64))
            self.rows[key] = np.append(self.rows[key], row)

    def where(self, kept: np.ndarray) -> "Cells":
        """Keep some prompts, [P] bool; a cell without any is gone."""
        found = Cells((), ())
        rows = ((key, rows[kept[rows]]) for key, rows in self.rows.items())
        found.rows = {key: some for key, some in rows if len(some)}
        return found

    def by_cell(self, values: np.ndarray) -> dict[str, dict[str, float]]:
        """Mean by task and length."""
        found: dict[str, dict[str, float]] = {}
        for (task, length), rows in self.rows.items():
            found.setdefault(task, {})[str(length)] = round(float(values[rows].mean()), 4)
        return found

    def by_group(self, values: np.ndarray) -> dict[str, float]:
        """Mean by group, all cells of a group weighing the same."""
        cells: dict[str, list[float]] = {}
        for (task, _), rows in self.rows.items():
            cells.setdefault(group_of(task), []).append(float(values[rows].mean()))
        return {group: float(np.mean(means)) for group, means in cells.items()}

    def overall(self, values: np.ndarray) -> float:
        """Mean of the judged groups, in equal weight."""
        groups = self.by_group(values)
        judged = [groups[name] for name in JUDGED_GROUPS if name in groups]
        return float(np.mean(judged or list(groups.values())))

    def resampled_means(
        self, values: list[np.ndarray], draws: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Draw prompts anew within every cell, the same for all values.

        Returns: group to [len(values), draws] means, all cells of a group weighing the same.
        """
        cells: dict[str, list[np.ndarray]] = {}
        for (task, _), rows in self.rows.items():
            drawn = rows[rng.integers(0, len(rows), (draws, len(rows)))]
            means = np.stack([value[drawn].mean(axis=1) for value in values])
            cells.setdefault(group_of(task), []).append(means)
        return {group: np.mean(means, axis=0) for group, means in cells.items()}


def resampled(
    cells: Cells, values: list[np.ndarray], statistic: str, draws: int = 1000, seed: int = 0
) -> np.ndarray:
    """Draw means anew for a paired bootstrap: every draw takes the same prompts for all values.

    Args:
        cells: of the prompts.
        values: per-prompt values [P] each.
        statistic: `overall`, or a group's name.
        draws: bootstrap draws.
        seed: of the draws.

    Returns: [len(values), draws] means.
    """
    groups = cells.resampled_means(values, draws, np.random.default_rng(seed))
    if statistic != "overall":
        return groups[statistic]
    judged = [groups[name] for name in JUDGED_GROUPS if name in groups]
    return np.mean(judged or list(groups.values()), axis=0)  # type: ignore[no-any-return]


def interval(
    cells: Cells,
    values: dict[str, np.ndarray],
    statistic: str,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Give paired bootstrap 95% intervals: every draw takes the same prompts for all values.

    Args:
        cells: of the prompts.
        values: named per-prompt values [P]; the first is the reference.
        statistic: `overall`, or a group's name.
        draws: bootstrap draws.
        seed: of the draws.

    Returns: `NAME` interval of the mean, `NAME/REFERENCE` of the ratio and `NAME-REFERENCE` of
        the difference to the reference.
    """
    means = resampled(cells, list(values.values()), statistic, draws, seed)
    table = dict(zip(values, means, strict=True))
    reference = next(iter(values))
    found = {name: bounds(mean) for name, mean in table.items()}
    for name, mean in table.items():
        if name != reference:
            found[f"{name}/{reference}"] = bounds(mean / np.maximum(table[reference], 1e-9))
            found[f"{name}-{reference}"] = bounds(mean - table[reference])
    return found


def bounds(means: np.ndarray) -> list[float]:
    """Give the 95% interval of resampled means [draws]."""
    low, high = np.percentile(means, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]
