"""Reports of several seeds, joined and plotted; the reports are made up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.evaluation.report import join_runs, plot_seeds


def made_point(threshold: float, least_shares: list[float], share: float) -> dict[str, Any]:
    scores = [f"{kind}_{name}" for kind in ("router", "static") for name in ("score", "retrieval")]
    place = {"threshold": threshold, "least_shares": least_shares}
    return place | {"share": share, "static_share": 0.6} | dict.fromkeys(scores, 0.5)


def write_runs(folder: Path, *points: list[dict[str, Any]]) -> list[Path]:
    """Write a report a seed; the second has no retrieval task."""
    files = []
    for seed, of_seed in enumerate(points):
        run = dict.fromkeys(("full_score", "all_sparse_score", "share_local"), 0.5) | {
            "share_retrieval": None if seed else 0.4,
            "default": {"threshold": 0.5, "full_by_group": {"retrieval": 0.5}},
            "points": of_seed,
            "patterns": {},
            "provenance": {"router": {"training": {"config": {"seed": seed}}}},
        }
        files.append(folder / f"{seed}.json")
        files[-1].write_text(json.dumps(run))
    return files


def test_join_averages_points_chosen_for_the_same_share(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = write_runs(
        tmp_path,
        [made_point(0.1, [0.6], 0.72), made_point(0.5, [], 0.8)],
        [made_point(0.3, [0.6], 0.92), made_point(0.5, [0.75], 0.8)],
    )
    joined = join_runs(files)
    assert joined["share_retrieval"] == 0.4
    found = {point["least_share"]: point for point in joined["points"]}
    assert set(found) == {0.6, None}  # 0.75 in one run alone
    assert found[0.6]["threshold"] == pytest.approx(0.2)
    assert found[0.6]["share"] == pytest.approx(0.82)
    assert found[None]["runs"] == 2
    assert list(joined["seeds"]) == ["0", "1"]
    plot_seeds(tmp_path / "curves.png", joined)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_join_averages_points_at_the_same_given_threshold(tmp_path: Path) -> None:
    """Also where one run chose it for a share besides; one that a single run has is left out."""
    files = write_runs(
        tmp_path,
        [made_point(0.4, [], 0.7), made_point(0.45, [], 0.6), made_point(0.5, [], 0.8)],
        [made_point(0.45, [0.75], 0.8), made_point(0.5, [], 0.9)],
    )
    found = {point["threshold"]: point for point in join_runs(files)["points"]}
    assert found.keys() == {0.45, 0.5}
    assert [point["least_share"] for point in found.values()] == [None, None]
    assert [point["runs"] for point in found.values()] == [2, 2]
    assert found[0.45]["share"] == pytest.approx(0.7)
    assert found[0.5]["share"] == pytest.approx(0.85)


def test_join_leaves_out_what_a_point_does_not_have(tmp_path: Path) -> None:
    """Tasks without retrieval, and thresholds scored without a static pattern beside them."""
    alone = {
        name: value
        for name, value in made_point(0.5, [], 0.8).items()
        if not name.startswith("static")
    }
    files = write_runs(tmp_path, [alone], [alone | {"router_retrieval": None}])
    (point,) = join_runs(files)["points"]
    assert point["router_score"] == 0.5
    assert point.keys().isdisjoint({"static_share", "static_score", "router_retrieval"})
    no_retrieval = join_runs([files[1]])
    assert no_retrieval["share_retrieval"] is None


def test_the_sweeps_have_a_panel_and_the_runs_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plots = pytest.importorskip("training.evaluation.plots")
    from matplotlib.colors import to_rgb

    point = {"share": 0.6, "router_score": 0.5, "router_retrieval": 0.4}
    run = {
        "points": [point],
        "default": {"full_by_group": {}},
        "full_score": 1,
        "all_sparse_score": 0,
    }
    tried = {"validation_thresholds": {"0.5": [0.7, 0.5], "0.1": [0.2, 0.6]}}
    shown = []
    monkeypatch.setattr(plots.plt, "close", shown.append)
    plots.plot_curves(tmp_path / "two.png", {"a": run})
    plots.plot_curves(tmp_path / "three.png", {"a": run, "b": run | {"static_patterns": tried}})
    two, three = (figure.axes for figure in shown)
    assert (len(two), len(three)) == (2, 3)
    (left,) = (line for line in three[0].lines if line.get_label() == "b")
    (sweep,) = (line for line in three[2].lines if line.get_label() == "b")
    assert to_rgb(sweep.get_color()) == to_rgb(left.get_color())
    np.testing.assert_allclose(sweep.get_xydata(), [[20, 0.6], [70, 0.5]])
