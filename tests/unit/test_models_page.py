"""The table of models and features names tests that are there, and every family that has one.

Oracle: the tests' own files.
"""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "MODELS.md").read_text(encoding="utf-8")


def _named() -> list[tuple[str, list[str]]]:
    """List the tests' files that the page's rows name, each with the names that follow it."""
    found: list[tuple[str, list[str]]] = []
    for row in PAGE.splitlines():
        if not row.startswith("|") or "`tests/" not in row:
            continue
        for word in re.findall(r"`([^`]+)`", row.split("|")[-2]):
            if word.endswith(".py"):
                found.append((word, []))
            else:
                found[-1][1].append(word)
    return found


def test_named_tests_are_there() -> None:
    named = _named()
    assert len(named) > 25
    for path, names in named:
        text = (REPOSITORY / path).read_text(encoding="utf-8")
        missing = [n for n in names if f'"{n}":' not in text and f"def {n}(" not in text]
        assert not missing, f"{path} has no {missing}"


@pytest.mark.parametrize("module", ["test_families", "test_layer_kinds", "test_position_axes"])
def test_every_family_is_named(module: str) -> None:
    families = vars(__import__(f"tests.e2e.{module}", fromlist=["FAMILIES"]))["FAMILIES"]
    rows = [names for path, names in _named() if path == f"tests/e2e/{module}.py"]
    named = {name for names in rows for name in names if not name.startswith("test_")}
    assert named == set(families)


def test_trained_families_are_those_whose_tests_train() -> None:
    rows = [row for row in PAGE.split("## Features")[0].splitlines() if "`tests/" in row]
    for row in rows:
        *_, trained, tests, _ = row.split("|")
        paths = re.findall(r"`(tests/e2e/[^`]+\.py)`", tests)
        texts = [(REPOSITORY / path).read_text(encoding="utf-8") for path in paths]
        signs = ("def test_training(", " check_training(", "load_for_training(")
        trains = any(sign in text for text in texts for sign in signs)
        assert trained.strip() == ("yes" if trains else "no"), row


def test_what_was_tested_on_a_gpu_is_recorded() -> None:
    record = (REPOSITORY / "benchmarks" / "results" / "gpu_tests_h200.txt").read_text()
    passed = re.findall(r"(test_\w+)\.py[^\n]* passed", record)
    rows = [row for row in PAGE.splitlines() if "`tests/" in row and "H200" in row.split("|")[3]]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`tests/gpu/(test_\w+)\.py`", row)
        assert named, row
        assert set(named) <= set(passed), row
