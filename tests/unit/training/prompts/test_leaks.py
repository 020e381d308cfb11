"""The search for shared runs of words. Oracle: a search for the words as one string."""

import json
import os
from pathlib import Path

import pytest

from training.prompts.leaks import (
    WORDS,
    evaluation_runs,
    leaking_wordings,
    shared_run,
    split_by_leaks,
    texts_in,
    word_runs,
)
from training.prompts.wordings_file import _FOLDER, all_wordings

EVALUATION = Path(
    os.environ.get("FLUX_EVAL_FOLDER", Path(__file__).resolve().parents[5] / "shared/eval")
)
_WORDS = [f"word{number}" for number in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    row = {"prompt": " ".join(_WORDS), "answers": ["一二三四五六七八九十百千万亿"], "id": 7}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_shared_run_finds_thirteen_words_and_not_twelve(folder: Path) -> None:
    forbidden = evaluation_runs(folder)
    thirteen = {"id": "a", "prompt": "before, " + " ".join(_WORDS[5 : 5 + WORDS]) + " after"}
    twelve = {"id": "b", "prompt": "before " + " ".join(_WORDS[5 : 4 + WORDS]) + " after"}
    assert shared_run(thirteen, forbidden) == " ".join(_WORDS[5 : 5 + WORDS])
    assert shared_run(twelve, forbidden) == ""


def test_shared_run_ignores_case_punctuation_and_line_breaks(folder: Path) -> None:
    words = ",\n".join(_WORDS[3:20]).upper()
    turns = [{"role": "user", "content": "hello"}, {"role": "user", "content": words}]
    assert shared_run({"id": "a", "messages": turns}, evaluation_runs(folder))


def test_shared_run_counts_chinese_characters_as_words(folder: Path) -> None:
    forbidden = evaluation_runs(folder)
    assert shared_run({"id": "a", "prompt": "说：一二三四五六七八九十百千万。"}, forbidden)
    assert not shared_run({"id": "a", "prompt": "说：一二三四五六七八九十百千。"}, forbidden)


@pytest.mark.parametrize("workers", [1, 2])
def test_split_by_leaks_drops_and_names_the_shared(folder: Path, workers: int) -> None:
    rows = [{"id": str(at), "prompt": f"clean words {at}"} for at in range(5)]
    rows[3]["prompt"] = " ".join(_WORDS)
    kept, dropped = split_by_leaks(rows, evaluation_runs(folder), workers)
    assert [row["id"] for row in kept] == ["0", "1", "2", "4"]
    assert dropped == [("3", " ".join(_WORDS[:WORDS]))]


def test_evaluation_runs_refuses_a_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected \.jsonl files"):
        evaluation_runs(tmp_path)


def test_word_runs_of_a_short_text_are_none() -> None:
    assert list(word_runs("too short")) == []


def test_no_wording_is_taken_from_evaluation_files() -> None:
    if not EVALUATION.is_dir():
        pytest.skip(f"needs the evaluation files in {EVALUATION}; FLUX_EVAL_FOLDER names another")
    forbidden = evaluation_runs(EVALUATION)
    said = [f"{wording.lead}\n{wording.ask}" for _, _, wording in all_wordings()]
    for file in sorted(_FOLDER.glob("*.json")):
        said += texts_in(json.loads(file.read_text(encoding="utf-8")))
    assert leaking_wordings(said, forbidden) == []
