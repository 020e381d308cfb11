"""Join the results of one or more folders: rows against full attention, tables, plots."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.real_tasks import plots, tables
from benchmarks.real_tasks.store import ResultFolder, Row
from benchmarks.real_tasks.tasks import COMPARED
from benchmarks.real_tasks.variants import BASELINES
from benchmarks.row_file import say
from training.evaluation.statistics import Cells, interval

SCORED: Final = ("longbench", "needles", "gsm8k", "gsm8k_list", "chains")
"""Families whose answers are scored."""


def join(folders: Sequence[Path]) -> list[Row]:
    """Make a row of every variant in every folder, against vLLM's own backend on the same prompts.

    Args:
        folders: of `answer`, each of one model and with its own full attention.

    Returns: rows; those of a folder by share of SPARSE.
    Raises: ValueError: a folder has not exactly one full attention, or other prompts than it.
    """
    return [row for folder in folders for row in _join_folder(ResultFolder(folder))]


def _join_folder(results: ResultFolder) -> list[Row]:
    found = {
        label: {measure: results.read(label, measure) for measure in results.measures(label)}
        for label in results.labels()
    }
    baselines = [label for label, of in found.items() if _policy(of) in BASELINES]
    if len(baselines) != 1:
        raise ValueError(
            f"{results.path}: expected the results of one of {BASELINES}, found those of "
            f"{baselines or 'none'}; answer with it into the same folder"
        )
    full = found[baselines[0]]
    rows = [_row(label, of, full) for label, of in found.items()]
    for row in rows:
        row["beside_static"] = beside_static(row, rows, found)
    return sorted(rows, key=lambda row: (row["sparse_share"] or 0.0, row["label"]))


def _policy(measures: dict[str, Row]) -> str:
    policy: str = next(iter(measures.values()))["variant"]["policy"]
    return policy


def _row(label: str, measures: dict[str, Row], full: dict[str, Row]) -> Row:
    first = next(iter(measures.values()))
    variant = first["variant"]
    row: Row = {
        "model": first["settings"]["model"],
        "label": label,
        "seed": variant["seed"],
        "policy": variant["policy"],
        "threshold": variant["threshold"],
        "sparse_layers": variant["layers"],
        "sparse_share": None,
        **{name: None for family in SCORED for name in (family, f"{family}_full")},
        "intervals": {},
        "tasks": {},
        "agreement": {},
    }
    for family in SCORED:
        if family not in measures or family not in full:
            continue
        _check_same(label, family, measures[family], full[family])
        row |= _scores(family, measures[family]["rows"], full[family]["rows"], row)
    if "longbench" in measures:
        row |= shares(measures["longbench"]["rows"], variant["policy"])
    for family in COMPARED:
        name = f"{family}-agreement"
        if name in measures:
            row["agreement"][family] = _agreement([measures[name]["rows"]])
    compared = [measures[name]["rows"] for name in measures if name.endswith("-agreement")]
    if compared:
        row["agreement"]["all"] = _agreement(compared)
    if "speed" in measures:
        row["speed"] = measures["speed"]["rows"]
    row["settings"] = first["settings"]
    row["provenance"] = first["provenance"]
    return row


def _check_same(label: str, family: str, ours: Row, theirs: Row) -> None:
    for name in ("prompts", "model", "dtype", "max_model_len", "chunk"):
        if ours["settings"][name] != theirs["settings"][name]:
            raise ValueError(
                f"{label}, {family}: expected the same {name} as full attention's "
                f"{theirs['settings'][name]!r}, found {ours['settings'][name]!r}; answer anew"
            )


def _scores(family: str, ours: list[Row], theirs: list[Row], row: Row) -> Row:
    """Return a family's scores: mean by task, then over tasks, with paired intervals."""
    tasks = [one["task"] for one in ours]
    values = {
        "full": np.array([one["score"] for one in theirs], dtype=np.float64),
        "own": np.array([one["score"] for one in ours], dtype=np.float64),
    }
    cells = Cells(tasks, [0] * len(tasks))
    means = {name: cells.overall(value) for name, value in values.items()}
    bounds = interval(cells, values, "overall")
    row["intervals"][family] = {
        "difference": bounds["own-full"],
        "ratio": bounds["own/full"],
        "score": bounds["own"],
    }
    for task in dict.fromkeys(tasks):
        members = [at for at, name in enumerate(tasks) if name == task]
        row["tasks"][task] = {
            "family": family,
            "prompts": len(members),
            "score": round(float(values["own"][members].mean()), 6),
            "full": round(float(values["full"][members].mean()), 6),
            "sparse_by_layer": _by_layer([ours[at]["routes"] for at in members]),
        }
    return {family: round(means["own"], 6), f"{family}_full": round(means["full"], 6)}


def beside_static(row: Row, rows: list[Row], found: dict[str, dict[str, Row]]) -> Row | None:
    """Compare a router with the static pattern whose share of SPARSE is nearest to its own.

    Args:
        row: of any variant.
        rows: of all variants.
        found: results by label and measure.

    Returns: the pattern's `label` and `sparse_share`; for `longbench` the score, for `agreement`
        the share of equal tokens: the router's less the pattern's, and the paired interval. None
        where there is nothing to compare.
    """
    patterns = [one for one in rows if one["policy"] == "static" and one["longbench"] is not None]
    if row["policy"] != "router" or row["longbench"] is None or not patterns:
        return None
    nearest = min(patterns, key=lambda one: abs(one["sparse_share"] - row["sparse_share"]))
    ours, theirs = found[row["label"]], found[nearest["label"]]
    compared: Row = {"label": nearest["label"], "sparse_share": nearest["sparse_share"]}
    compared["longbench"] = _difference(
        ours["longbench"]["rows"], theirs["longbench"]["rows"], "score"
    )
    measures = sorted(name for name in ours if name.endswith("-agreement") and name in theirs)
    if measures:
        sides = [
            [one | {"task": "all"} for name in measures for one in side[name]["rows"]]
            for side in (ours, theirs)
        ]
        compared["agreement"] = _difference(*sides, "equal_tokens")
    return compared


def _difference(ours: list[Row], theirs: list[Row], name: str) -> Row:
    """Return the difference of means over tasks, ours less theirs, and its paired interval."""
    tasks = [one["task"] for one in ours]
    values = {
        "theirs": np.array([one[name] for one in theirs], dtype=np.float64),
        "ours": np.array([one[name] for one in ours], dtype=np.float64),
    }
    cells = Cells(tasks, [0] * len(tasks))
    difference = cells.overall(values["ours"]) - cells.overall(values["theirs"])
    bounds = interval(cells, values, "overall")["ours-theirs"]
    return {"difference": round(difference, 6), "interval": bounds}


def _by_layer(routes: list[str | None]) -> list[float] | None:
    """Return the share of prompts whose layer was SPARSE, by layer."""
    decided = [letters for letters in routes if letters is not None]
    if not decided:
        return None
    sparse = np.array([[letter == "S" for letter in letters] for letters in decided])
    return [round(float(share), 4) for share in sparse.sum(axis=0) / len(routes)]


def shares(rows: list[Row], policy: str) -> Row:
    """Return the mean share of SPARSE over prompts.

    A prompt without a decision, whose context never passed sink and window, attended to all of it:
    it counts as FULL.
    """
    decided = [one["sparse_share"] for one in rows]
    undecided = sum(share is None for share in decided)
    return {
        "sparse_share": round(sum(share or 0.0 for share in decided) / len(decided), 6),
        "prompts_without_routes": None if policy in BASELINES else undecided,
    }


def _agreement(families: list[list[Row]]) -> Row:
    """Return the means over prompts, and the interval of the share of equal tokens."""
    rows = [row for rows in families for row in rows]
    cells = Cells(["all"] * len(rows), [0] * len(rows))
    found: Row = {
        "prompts": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
    }
    for name in ("equal_tokens", "same_prefix", "kl"):
        values = np.array([row[name] for row in rows])
        found[name] = round(float(values.mean()), 6)
        found[f"{name}_interval"] = interval(cells, {name: values}, "overall")[name]
    return found


def write(rows: list[Row], path: Path) -> None:
    """Write rows as JSON, tables beside them as Markdown, plots as PNG; print the tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    text = "\n\n".join(tables.all_tables(rows))
    path.with_suffix(".md").write_text(f"{text}\n")
    say(text)
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model: list[dict[str, Any]] = [row for row in rows if row["model"] == model]
        stem = path.with_name(f"{path.stem}_{model}")
        plots.plot_curve(stem.with_name(f"{stem.name}_curve.png"), of_model)
        plots.plot_score_map(stem.with_name(f"{stem.name}_tasks.png"), of_model)
        plots.plot_route_map(stem.with_name(f"{stem.name}_routes.png"), of_model)
