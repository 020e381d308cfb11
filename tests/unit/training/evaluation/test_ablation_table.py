"""The table of ablations against plain NumPy over prompts with known scores."""

import json
from pathlib import Path

import numpy as np
import pytest

from training.evaluation.ablation_table import tabulate

TASKS = np.repeat(["needle", "multi_key", "list_end", "few_shot"], 50)
CHANGES = {"base": (), "other": ("--seed", "1"), "narrow": ("--data.tasks", "needle")}


def write(folder: Path, scores: dict[str, np.ndarray], full: np.ndarray, seed: int = 1) -> Path:
    folder.mkdir(parents=True)
    asked = {"seed": seed, "lengths": [256], "prompts_per_cell": 50, "corpus_sha256": "c"}
    training = {"steps": 9, "seconds": 2.0}
    report = {"provenance": asked | {"router": {"training": training}}}
    (folder / "quality.json").write_text(json.dumps(report))
    values = {f"router@{threshold}": score for threshold, score in scores.items()}
    values |= {f"share@{name}": np.full(200, float(name) / 2) for name in scores}
    np.savez(
        folder / "scores.npz",
        task=TASKS,
        length=np.full(200, 256),
        full=full,
        **values,  # type: ignore[arg-type]
    )
    return folder


def test_rows_say_how_far_a_router_is_from_the_base(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    full = 0.5 + 0.5 * rng.random(200)
    base = full * rng.random(200)
    lower = base - 0.1 * full
    noisy = full * rng.random(200)
    folders = {
        "base": write(tmp_path / "base", {"0.5": base}, full),
        "other": write(tmp_path / "other", {"0.5": base, "0.7": lower}, full),
        "narrow": write(tmp_path / "narrow", {"0.5": noisy}, full),
    }
    evaluated = {"default": folders, "validated": {}}
    tabulate(tmp_path, evaluated, CHANGES, "base", {"narrow": "multi_key"})
    table = json.loads((tmp_path / "ablations.json").read_text())
    assert "validated" not in table
    rows = table["default"]
    assert "minus_base" not in rows["base"]

    def mean(values: np.ndarray) -> float:
        retrieval = (values[:50].mean() + values[50:100].mean()) / 2
        return float(retrieval + values[100:150].mean()) / 2

    assert rows["base"]["of_full"][0] == pytest.approx(mean(base) / mean(full), abs=1e-4)
    low, high = rows["base"]["of_full"][1:]
    assert low < rows["base"]["of_full"][0] < high
    # A tenth of full attention's score less on every prompt: the interval has no width.
    assert rows["other"]["threshold"] == 0.7
    assert rows["other"]["share"] == pytest.approx(0.35)
    for group in ("overall", "retrieval", "local"):
        assert rows["other"]["minus_base"][group] == pytest.approx([-0.1] * 3, abs=1e-4)
    found = rows["narrow"]
    difference, low, high = found["minus_base"]["overall"]
    assert difference == pytest.approx((mean(noisy) - mean(base)) / mean(full), abs=1e-4)
    assert low < difference < high
    family = slice(50, 100)
    assert found["left_out"]["task"] == "multi_key"
    for name, values in (("score", noisy), ("full", full), ("base", base)):
        assert found["left_out"][name] == pytest.approx(values[family].mean())
    assert found["left_out"]["minus_base"][0] == pytest.approx(
        (noisy[family].mean() - base[family].mean()) / full[family].mean(), abs=1e-4
    )
    assert "multi_key: " in (tmp_path / "ablations.md").read_text()
    assert table["provenance"]["default"]["narrow"]["router"]["training"]["steps"] == 9


def test_the_others_stand_alone_until_the_base_is_there(tmp_path: Path) -> None:
    folders = {"other": write(tmp_path / "other", {"0.5": np.ones(200)}, np.ones(200))}
    tabulate(tmp_path, {"default": folders}, CHANGES, "base", {"other": "needle"})
    row = json.loads((tmp_path / "ablations.json").read_text())["default"]["other"]
    assert row["of_full"] == [1.0, 1.0, 1.0]
    assert "minus_base" not in row
    assert row["left_out"] == {"task": "needle", "score": 1.0, "full": 1.0}


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    folders = {
        "base": write(tmp_path / "base", {"0.5": np.ones(200)}, np.ones(200)),
        "other": write(tmp_path / "other", {"0.5": np.ones(200)}, np.ones(200), seed=2),
    }
    with pytest.raises(ValueError, match="same prompts"):
        tabulate(tmp_path, {"default": folders}, CHANGES, "base", {})
