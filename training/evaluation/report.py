"""Write `quality.json` and its plots; join the runs of several seeds."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_MEANS = ("full_score", "all_sparse_score", "share_local", "share_retrieval")
_PATTERN_MEANS = ("share", "score", "of_full", "all_sparse_score", "all_sparse_density")
_POINT_MEANS = (
    "threshold",
    "share",
    "static_share",
    "router_score",
    "static_score",
    "router_retrieval",
    "static_retrieval",
)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write figures in one atomic step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(report, indent=1, default=float) + "\n", encoding="utf-8")
    temporary.replace(path)


def plot_report(folder: Path, report: dict[str, Any]) -> None:
    """Plot one run's curve, heat map and, where there are several, patterns.

    Raises: ValueError: matplotlib is not installed.
    """
    plots = _plots(folder / "quality.json")
    plots.plot_curves(folder / "curve.png", {"router": report})
    plots.plot_heat_map(folder / "heat_map.png", report)
    if len(report["patterns"]) > 1:
        plots.plot_patterns(folder / "patterns.png", report)


def plot_seeds(path: Path, joined: dict[str, Any]) -> None:
    """Plot the curves of several seeds, as `join_runs` joined them.

    Raises: ValueError: matplotlib is not installed.
    """
    runs = {f"router, seed {seed}": run for seed, run in joined["seeds"].items()}
    _plots(path.with_suffix(".json")).plot_curves(path, runs)


def _plots(figures: Path) -> ModuleType:
    try:
        from training.evaluation import plots
    except ImportError as error:
        raise ValueError(
            f"expected matplotlib for the plots, found none ({error}); install the extra `train`. "
            f"The figures are in {figures}"
        ) from error
    return plots


def join_runs(files: list[Path]) -> dict[str, Any]:
    """Join the reports of several seeds: their means in front, each run below `seeds`.

    Points are averaged over the runs, two at least, that have one at the default threshold or at
    the same given one (`least_share` None), or one chosen for the same least share of SPARSE
    layers; patterns over the runs that have them.

    Raises: ValueError: no file.
    """
    if not files:
        raise ValueError("expected at least one quality.json, found none; name them")
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    joined: dict[str, Any] = {}
    for name in _MEANS:
        known = [run[name] for run in runs if run[name] is not None]
        joined[name] = float(np.mean(known)) if known else None
    every = [point for run in runs for point in run["points"]]
    # The default one is given, too.
    given = {run["default"]["threshold"] for run in runs if run["points"]}
    given |= {point["threshold"] for point in every if not point["least_shares"]}
    alike: dict[tuple[float | None, float], list[dict[str, Any]]] = {}
    for point in every:
        if point["threshold"] in given:
            alike.setdefault((None, point["threshold"]), []).append(point)
        for least in point["least_shares"]:
            alike.setdefault((least, 0.0), []).append(point)
    joined["points"] = [
        {"least_share": least, "runs": len(points)}
        | {
            name: float(np.mean([point[name] for point in points]))
            for name in _POINT_MEANS
            if all(point.get(name) is not None for point in points)
        }
        for (least, _), points in alike.items()
        if len(points) >= min(2, len(runs))
    ]
    by_pattern: dict[str, list[dict[str, Any]]] = {}
    for name, found in (item for run in runs for item in run["patterns"].items()):
        by_pattern.setdefault(name, []).append(found)
    joined["patterns"] = {
        pattern: {"runs": len(rows)}
        | {name: float(np.mean([row[name] for row in rows])) for name in _PATTERN_MEANS}
        for pattern, rows in by_pattern.items()
    }
    return joined | {"seeds": {_seed(run, at): run for at, run in enumerate(runs)}}


def put_beside(joined: dict[str, Any], others: Iterable[tuple[str, Path]]) -> dict[str, Any]:
    """Put further reports, such as one of fewer prompts, into a joined one.

    Args:
        joined: of `join_runs`.
        others: the name under which each stands, and its JSON file.

    Raises: ValueError: a name that the report already has.
    """
    whole = dict(joined)
    for name, file in others:
        if name in whole:
            raise ValueError(
                f"expected a new name for {file}, found {name!r}, which the report has beside "
                f"{sorted(whole.keys() - {name})}; choose another with --beside"
            )
        whole[name] = json.loads(file.read_text(encoding="utf-8"))
    return whole


def _seed(run: dict[str, Any], at: int) -> str:
    training = run["provenance"]["router"]["training"]
    return str(training.get("config", {}).get("seed", at))
