"""The quality/sparsity curve, the layer x task heat map, and the bars of the sparse patterns."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_curves(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Plot mean and retrieval score against the share of SPARSE layers, routers and static.

    Where thresholds were tried on validation prompts, beside them the whole sweep, on those.

    Args:
        path: of the picture.
        runs: contents of `quality.json` by the router's name; all of the same prompts.
    """
    sweeps = {
        name: run["static_patterns"]["validation_thresholds"]
        for name, run in runs.items()
        if run.get("static_patterns", {}).get("validation_thresholds")
    }
    panels = 3 if sweeps else 2
    figure, (left, right, *more) = plt.subplots(1, panels, figsize=(5 * panels, 4))
    right.sharex(left)
    first = next(iter(runs.values()))
    every = [point for run in runs.values() for point in run["points"]]
    beside = {point["static_share"]: point for point in every if "static_share" in point}
    static = sorted(beside.items())
    for axes, kind, title in ((left, "score", "mean score"), (right, "retrieval", "retrieval")):
        for name, run in runs.items():
            points = sorted(run["points"], key=lambda point: point["share"])
            shares = [100 * point["share"] for point in points]
            axes.plot(shares, [point[f"router_{kind}"] for point in points], "o-", label=name)
        if static:
            axes.plot(
                [100 * share for share, _ in static],
                [point[f"static_{kind}"] for _, point in static],
                "ks--",
                label="best static pattern",
            )
        axes.set_title(title)
        axes.set_xlabel("SPARSE layers, % (mean)")
        axes.grid(alpha=0.3)
    left.axhline(first["full_score"], color="black", linewidth=0.8, label="all FULL")
    left.axhline(first["all_sparse_score"], color="grey", linewidth=0.8, label="all SPARSE")
    full_retrieval = first["default"]["full_by_group"].get("retrieval")
    if full_retrieval is not None:
        right.axhline(full_retrieval, color="black", linewidth=0.8)
    for axes in more:
        for at, name in enumerate(runs):  # in the colours of the other panels
            if name in sweeps:
                sweep = sorted((100 * share, score) for share, score in sweeps[name].values())
                axes.plot(*zip(*sweep, strict=True), ".-", color=f"C{at}", label=name)
        axes.legend()
        axes.set_title("thresholds tried: mean score of validation prompts")
        axes.set_xlabel("SPARSE layers, % (mean)")
        axes.grid(alpha=0.3)
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_heat_map(path: Path, report: dict[str, Any]) -> None:
    """Plot the share of SPARSE by layer and task."""
    tasks = list(report["heat_map"])
    figure, axes = plt.subplots(figsize=(10, 1 + 0.35 * len(tasks)))
    image = axes.imshow(
        [report["heat_map"][task] for task in tasks], aspect="auto", vmin=0, vmax=1, cmap="viridis"
    )
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xticks(range(len(report["layers"])), report["layers"], fontsize=6)
    axes.set_xlabel("layer")
    figure.colorbar(image, label="share of SPARSE")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_patterns(path: Path, report: dict[str, Any]) -> None:
    """Plot the scores of the router and of all SPARSE under each sparse pattern."""
    patterns = report["patterns"]
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(patterns), 4))
    for shift, kind, label in ((-0.2, "score", "router"), (0.2, "all_sparse_score", "all SPARSE")):
        places = [place + shift for place in range(len(patterns))]
        axes.bar(places, [found[kind] for found in patterns.values()], 0.4, label=label)
    axes.axhline(report["full_score"], color="black", linewidth=0.8, label="all FULL")
    axes.set_xticks(
        range(len(patterns)),
        [f"{name}\ndensity {found['all_sparse_density']:.2f}" for name, found in patterns.items()],
    )
    axes.set_ylabel("mean score")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
