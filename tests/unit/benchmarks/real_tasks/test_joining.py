"""Rows, tables and plots of what was answered.

Oracle: means worked out by hand.
"""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_tasks.joining import join, shares, write
from benchmarks.real_tasks.store import ResultFolder

SETTINGS = {"model": "m", "dtype": "bfloat16", "max_model_len": 64, "chunk": 8, "prompts": "abc"}
# Two prompts of one task, one of another: the means weigh tasks alike.
TASKS = ["qasper", "qasper", "lcc"]


def _variant(policy: str, **fields: Any) -> dict[str, Any]:
    return {"policy": policy, "layers": None, "threshold": None, "seed": None} | fields


def _rows(scores: list[float], routes: list[str | None]) -> list[dict[str, Any]]:
    return [
        {"task": task, "id": str(at), "score": score, "routes": letters,
         "sparse_share": letters and letters.count("S") / len(letters)}
        for at, (task, score, letters) in enumerate(zip(TASKS, scores, routes, strict=True))
    ]  # fmt: skip


def _agreement(equal: list[float]) -> list[dict[str, Any]]:
    return [
        {"task": task, "tokens": 10, "equal_tokens": value, "same_prefix": value / 2, "kl": 0.1}
        for task, value in zip(TASKS, equal, strict=True)
    ]


def _times(ttft: float) -> list[dict[str, Any]]:
    return [
        {"prompt_tokens": 16384, "at_once": 1, "ttft_ms": {"median": ttft},
         "token_ms": {"median": ttft / 10}}
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results = ResultFolder(tmp_path / "run")
    full, router = _variant("flash_attn"), _variant("router", threshold=0.5, seed=1)
    nothing: list[str | None] = [None] * 3
    for label, variant, scores, routes, times in (
        ("flash_attn", full, [1.0, 0.0, 0.8], nothing, 20.0),
        ("a-t0.5", router, [0.5, 0.5, 0.4], ["SSFF", "SFFF", None], 10.0),
    ):
        for family in ("longbench", "needles"):
            results.write(label, family, SETTINGS, variant, _rows(scores, routes))
        results.write(label, "longbench-agreement", SETTINGS, variant, _agreement([1.0, 0.8, 0.6]))
        results.write(label, "speed", SETTINGS, variant, _times(times))
    return results.path


def test_join_gives_a_row_of_each_variant(folder: Path) -> None:
    full, row = join([folder])
    assert (full["policy"], full["sparse_share"], full["longbench"]) == ("flash_attn", 0.0, 0.65)
    assert full["prompts_without_routes"] is None
    assert (row["model"], row["policy"], row["threshold"], row["seed"]) == ("m", "router", 0.5, 1)
    assert (row["longbench"], row["longbench_full"]) == (0.45, 0.65)
    assert row["needles"] == 0.45
    assert row["gsm8k"] is row["gsm8k_full"] is None
    assert row["sparse_share"] == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert row["prompts_without_routes"] == 1
    assert row["tasks"]["qasper"]["score"] == 0.5
    assert row["tasks"]["qasper"]["sparse_by_layer"] == [1.0, 0.5, 0.0, 0.0]
    assert row["agreement"]["longbench"]["prompts"] == 3
    assert row["agreement"]["all"]["equal_tokens"] == pytest.approx(0.8)
    assert row["agreement"]["all"]["same_prefix"] == pytest.approx(0.4)
    low, high = row["intervals"]["longbench"]["difference"]
    # lcc has one prompt; qasper's two draw -0.5, 0 or +0.5, in equal weight with it.
    assert (low, high) == (pytest.approx(-0.45), pytest.approx(0.05))
    assert full["intervals"]["longbench"]["ratio"] == [1.0, 1.0]
    assert row["provenance"]["versions"]


def test_shares_count_prompts_without_a_decision_as_full() -> None:
    rows = _rows([0.0] * 3, ["SSSS", None, "SSFF"])
    assert shares(rows, "router") == {"sparse_share": 0.5, "prompts_without_routes": 1}


def test_join_wants_one_full_attention(folder: Path, tmp_path: Path) -> None:
    results = ResultFolder(tmp_path / "other")
    results.write("full", "needles", SETTINGS, _variant("full"), _rows([1.0] * 3, ["FF"] * 3))
    with pytest.raises(ValueError, match="expected the results of one of .* found those of none"):
        join([results.path])


def test_join_refuses_other_prompts(folder: Path) -> None:
    settings = SETTINGS | {"prompts": "xyz"}
    rows = _rows([1.0] * 3, ["FF"] * 3)
    ResultFolder(folder).write("full", "needles", settings, _variant("full"), rows)
    with pytest.raises(ValueError, match="full, needles: expected the same prompts as full"):
        join([folder])


def test_router_is_held_against_the_nearest_static_pattern(folder: Path) -> None:
    results = ResultFolder(folder)
    for label, routes in (("near", "SFFF"), ("far", "SSSS")):
        variant = _variant("static", layers=[0])
        rows = _rows([0.5, 0.1, 0.4], [routes] * 3)
        results.write(label, "longbench", SETTINGS, variant, rows)
        results.write(label, "longbench-agreement", SETTINGS, variant, _agreement([0.7] * 3))
    rows = {row["label"]: row for row in join([folder])}
    found = rows["a-t0.5"]["beside_static"]
    assert (found["label"], found["sparse_share"]) == ("near", 0.25)
    # qasper: 0.5 against 0.3, lcc alike.
    assert found["longbench"]["difference"] == pytest.approx(0.1)
    low, high = found["longbench"]["interval"]
    assert (low, high) == (0.0, pytest.approx(0.2))
    assert found["agreement"]["difference"] == pytest.approx(0.1)
    assert rows["near"]["beside_static"] is rows["flash_attn"]["beside_static"] is None
    write(list(rows.values()), folder.parent / "real_tasks.json")
    text = (folder.parent / "real_tasks.md").read_text()
    assert "| a-t0.5 | 0.250 | near | 0.250 | +10.00 [+0.00, +20.00] | +10.00 [" in text


def test_write_puts_tables_and_plots_beside_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(join([folder]), tmp_path / "real_tasks.json")
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    plots = {f"real_tasks_m_{name}.png" for name in ("curve", "tasks", "routes")}
    assert names == {"real_tasks.json", "real_tasks.md", *plots}
    text = (tmp_path / "real_tasks.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    assert "| a-t0.5 | 0.250 | 0.450 | 69.2% [" in text
    assert "| a-t0.5 | 80.00% [" in text
    assert "longbench (3): equal tokens [95%]" in text
    assert "| a-t0.5 | 0.250 | 0.450 | 10.00 (0.50) | 1.00 (0.50) |" in text
