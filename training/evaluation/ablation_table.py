"""One table of several routers on the same held-out prompts, each against a base.

Dimension legend: P prompts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation.report import write_json
from training.evaluation.statistics import JUDGED_GROUPS, Cells, bounds, resampled

_DEFAULT = "0.5"
_ASKED = ("seed", "lengths", "prompts_per_cell", "corpus_sha256")
"""Of an evaluation's provenance: what its prompts are made of, beside tasks."""
_COLUMNS = (
    "router",
    "steps",
    "threshold",
    "SPARSE: retrieval / local / mean",
    "score: retrieval / local",
    "of full",
    "minus base, points of full",
    "left out: score / base / full",
)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One router's evaluation, at one threshold."""

    report: dict[str, Any]
    """Of `quality.json`."""
    threshold: str
    tasks: np.ndarray
    """[P] str."""
    lengths: np.ndarray
    """[P] int64."""
    full: np.ndarray
    """[P] float32 score of full attention."""
    score: np.ndarray
    """[P] float32 score of the router."""
    share: np.ndarray
    """[P] float32 share of SPARSE layers."""

    @classmethod
    def read(cls, folder: Path) -> "Evaluated":
        """Read what an evaluation wrote, at its lowest threshold beside the default, or at that."""
        report = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
        with np.load(folder / "scores.npz") as stored:
            thresholds = [name.partition("@")[2] for name in stored if name.startswith("router@")]
            threshold = next((name for name in thresholds if name != _DEFAULT), _DEFAULT)
            return cls(
                report,
                threshold,
                *(stored[name] for name in ("task", "length", "full")),
                *(stored[f"{name}@{threshold}"] for name in ("router", "share")),
            )

    def cells(self, task: str = "") -> tuple[Cells, np.ndarray]:
        """Group the prompts of one task, or of all, and give their places."""
        rows = np.flatnonzero((self.tasks == task) | (task == ""))
        return Cells(self.tasks[rows].tolist(), self.lengths[rows].tolist()), rows


def tabulate(
    folder: Path,
    evaluated: Mapping[str, Mapping[str, Path]],
    changes: Mapping[str, Sequence[str]],
    base: str,
    left_out: Mapping[str, str],
) -> None:
    """Write `ablations.json` and `ablations.md`.

    Args:
        folder: for both.
        evaluated: by kind of evaluation, then by name, the folder with `quality.json` and
            `scores.npz`.
        changes: by name, the flags in which its training differs from the base's.
        base: name of what the others are compared with; until it is there, they are not.
        left_out: by name, the task that its training left out.
    """
    tables: dict[str, Any] = {}
    sources: dict[str, Any] = {}
    for kind, folders in evaluated.items():
        runs = {name: Evaluated.read(place) for name, place in folders.items()}
        tables[kind] = {
            name: {"change": list(changes[name])}
            | describe(run, None if name == base else runs.get(base), left_out.get(name, ""))
            for name, run in runs.items()
        }
        sources[kind] = {name: run.report["provenance"] for name, run in runs.items()}
    tables = {kind: rows for kind, rows in tables.items() if rows}
    write_json(folder / "ablations.json", {"base": base, **tables, "provenance": sources})
    text = "\n".join(markdown(kind, rows) for kind, rows in tables.items())
    (folder / "ablations.md").write_text(text, encoding="utf-8")


def describe(run: Evaluated, base: Evaluated | None, left_out: str) -> dict[str, Any]:
    """Give one row: what a router scores, and how far it is from the base's.

    Args:
        run: the router's.
        base: the base's; None: not known.
        left_out: task that was not trained on, or empty.

    Raises: ValueError: the two were not asked the same prompts.
    """
    if base is not None and not _same_prompts(run, base):
        raise ValueError(
            "expected two evaluations of the same prompts, found others; evaluate both with the "
            "same tasks, lengths, prompts and seed"
        )
    cells, _ = run.cells()
    training = run.report["provenance"]["router"]["training"]
    row = {
        "steps": training.get("steps"),
        "train_seconds": training.get("seconds"),
        "threshold": float(run.threshold),
        "share": cells.overall(run.share),
        "share_by_group": cells.by_group(run.share),
        "score": cells.overall(run.score),
        "score_by_group": cells.by_group(run.score),
        "full_by_group": cells.by_group(run.full),
        "of_full": _of_full(run, "overall"),
    }
    groups = [name for name in JUDGED_GROUPS if name in cells.by_group(run.full)]
    if base is not None:
        row["minus_base"] = {name: _minus_base(run, base, name) for name in ("overall", *groups)}
    if left_out and (run.tasks == left_out).any():
        row["left_out"] = {
            "task": left_out,
            "score": float(run.score[run.tasks == left_out].mean()),
            "full": float(run.full[run.tasks == left_out].mean()),
        }
        if base is not None:
            row["left_out"] |= {
                "base": float(base.score[run.tasks == left_out].mean()),
                "minus_base": _minus_base(run, base, "overall", left_out),
            }
    return row


def _same_prompts(run: Evaluated, base: Evaluated) -> bool:
    one, other = (side.report["provenance"] for side in (run, base))
    return np.array_equal(run.tasks, base.tasks) and all(
        one[name] == other[name] for name in _ASKED
    )


def _of_full(run: Evaluated, statistic: str) -> list[float]:
    """Give the part of full attention's mean score that a router keeps, and its interval."""
    cells, _ = run.cells()
    full, score = resampled(cells, [run.full, run.score], statistic)
    kept = cells.overall(run.score) / max(cells.overall(run.full), 1e-9)
    return [round(kept, 4), *bounds(score / np.maximum(full, 1e-9))]


def _minus_base(run: Evaluated, base: Evaluated, statistic: str, task: str = "") -> list[float]:
    """Give the difference of two routers' parts of full attention's score, and its interval.

    Every draw takes the same prompts for full attention and both routers.

    Args:
        run: one router's.
        base: the other's.
        statistic: `overall`, or a group's name.
        task: whose prompts alone are looked at; empty: all.
    """
    cells, rows = run.cells(task)
    values = [run.full[rows], run.score[rows], base.score[rows]]
    full, one, other = (
        cells.overall(value) if statistic == "overall" else cells.by_group(value)[statistic]
        for value in values
    )
    drawn = resampled(cells, values, statistic)
    low, high = bounds((drawn[1] - drawn[2]) / np.maximum(drawn[0], 1e-9))
    return [round((one - other) / max(full, 1e-9), 4), low, high]


def markdown(kind: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the rows of one kind of evaluation as a Markdown table; differences in points."""
    lines = [
        f"**{kind}**",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for name, row in rows.items():
        cells = [
            name,
            str(row["steps"]),
            f"{row['threshold']:g}",
            " / ".join([*_by_group(row["share_by_group"]), f"{row['share']:.2f}"]),
            " / ".join(_by_group(row["score_by_group"], digits=3)),
            _percent(row["of_full"]) + "%",
            _percent(row["minus_base"]["overall"]) if "minus_base" in row else "",
        ]
        found = row.get("left_out")
        cells.append(
            f"{found['task']}: {found['score']:.3f} / {found.get('base', float('nan')):.3f} / "
            f"{found['full']:.3f}"
            if found
            else ""
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _by_group(values: Mapping[str, float], digits: int = 2) -> list[str]:
    return [f"{values[name]:.{digits}f}" if name in values else "-" for name in JUDGED_GROUPS]


def _percent(value: Sequence[float]) -> str:
    middle, low, high = (100 * number for number in value)
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"
