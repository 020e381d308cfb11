"""Curves of score by share of SPARSE, and heat maps by task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, Any]

_PANELS = {"longbench": "LongBench", "needles": "needles", "gsm8k": "GSM8K"}


def plot_curve(path: Path, rows: Sequence[Row]) -> None:
    """Plot scores as shares of full attention's, and agreement, by share of SPARSE.

    Bars are paired 95% intervals. Routers of one training are joined, and so are fixed routes.
    """
    panels = [family for family in _PANELS if any(row[family] is not None for row in rows)]
    agrees = any(row["agreement"] for row in rows)
    count = max(1, len(panels) + agrees)
    figure, grid = plt.subplots(1, count, figsize=(5 * count, 4), squeeze=False)
    for axes, family in zip(grid[0], panels, strict=False):
        for name, group in _lines(rows).items():
            known = [row for row in group if row[f"{family}_full"]]
            if known:
                _errorbar(axes, name, known, *_ratios(known, family))
        axes.axhline(100, color="black", linewidth=0.8)
        axes.set_title(_PANELS[family])
        axes.set_ylabel("% of full attention's score")
    if agrees:
        axes = grid[0][len(panels)]
        for name, group in _lines(rows).items():
            known = [row for row in group if row["agreement"]]
            if known:
                found = [row["agreement"]["all"] for row in known]
                values = [100 * one["equal_tokens"] for one in found]
                bounds = [[100 * end for end in one["equal_tokens_interval"]] for one in found]
                _errorbar(axes, name, known, values, bounds)
        axes.set_title("agreement with full attention")
        axes.set_ylabel("% equal tokens, teacher-forced")
    for axes in grid[0]:
        axes.set_xlabel("SPARSE layers, % (mean)")
        axes.grid(alpha=0.3)
    grid[0][0].legend()
    _save(figure, path)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows that belong to one line, by share of SPARSE."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["sparse_share"] is None or row["policy"].endswith("_attn"):
            continue
        name = f"router, seed {row['seed']}" if row["policy"] == "router" else "fixed routes"
        groups.setdefault(name, []).append(row)
    return {
        name: sorted(group, key=lambda row: row["sparse_share"]) for name, group in groups.items()
    }


def _ratios(rows: Sequence[Row], family: str) -> tuple[list[float], list[list[float]]]:
    values = [100 * row[family] / row[f"{family}_full"] for row in rows]
    return values, [[100 * end for end in row["intervals"][family]["ratio"]] for row in rows]


def _errorbar(
    axes: Any, name: str, rows: Sequence[Row], values: list[float], bounds: list[list[float]]
) -> None:
    # A bootstrap's bounds may lie on one side of the value, where a bar cannot.
    below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]
    shares = [100 * row["sparse_share"] for row in rows]
    axes.errorbar(shares, values, yerr=[below, above], fmt="o-", capsize=3, label=name)


def plot_score_map(path: Path, rows: Sequence[Row]) -> None:
    """Plot each task's score under each variant less full attention's."""
    shown = [row for row in rows if row["tasks"]]
    tasks = list(dict.fromkeys(task for row in shown for task in row["tasks"]))
    if not tasks:
        return
    nothing = float("nan")
    values = [
        [
            100 * (row["tasks"][task]["score"] - row["tasks"][task]["full"])
            if task in row["tasks"]
            else nothing
            for row in shown
        ]
        for task in tasks
    ]
    figure, axes = plt.subplots(figsize=(3 + 0.8 * len(shown), 1.5 + 0.4 * len(tasks)))
    image = axes.imshow(values, aspect="auto", cmap="RdBu", vmin=-30, vmax=30)
    names = [f"{row['label']} ({row['sparse_share'] or 0:.2f})" for row in shown]
    axes.set_xticks(range(len(shown)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    for at, line in enumerate(values):
        for column, value in enumerate(line):
            if value == value:  # not NaN
                axes.text(column, at, f"{value:+.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="score less full attention's, points")
    _save(figure, path)


def plot_route_map(path: Path, rows: Sequence[Row]) -> None:
    """Plot the share of SPARSE by layer and task, for the router nearest to half SPARSE."""
    routers = [row for row in rows if row["policy"] == "router" and row["tasks"]]
    if not routers:
        return
    row = min(routers, key=lambda row: abs((row["sparse_share"] or 0.0) - 0.5))
    known = {
        task: found["sparse_by_layer"]
        for task, found in row["tasks"].items()
        if found["sparse_by_layer"] is not None
    }
    if not known:
        return
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.35 * len(known)))
    image = axes.imshow(list(known.values()), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(range(len(known)), list(known))
    axes.set_xlabel("layer")
    axes.set_title(f"{row['label']}: {row['sparse_share'] or 0:.2f} SPARSE")
    figure.colorbar(image, label="share of SPARSE")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
