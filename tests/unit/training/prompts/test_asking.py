"""Requests to a writer: the same for a seed, of every kind, and their passages found again."""

import dataclasses
from typing import Any

import pytest

from training.prompts.asking import make_requests
from training.prompts.passages import Library, Passage
from training.prompts.texts import Text
from training.prompts.written import read_written


def test_make_requests_repeats_itself(library: Library) -> None:
    assert list(make_requests(library, 80, seed=4)) == list(make_requests(library, 80, seed=4))
    assert list(make_requests(library, 80, seed=4)) != list(make_requests(library, 80, seed=5))


def test_make_requests_needs_no_tokenizer(library: Library, texts: list[Text]) -> None:
    assert list(make_requests(Library(texts, {}), 40, seed=4)) == list(
        make_requests(library, 40, seed=4)
    )


def test_make_requests_gives_each_an_id_and_holds_the_passage(library: Library) -> None:
    rows = list(make_requests(library, 300, seed=2))
    assert len({row["id"] for row in rows}) == 300
    kinds = {row["kind"] for row in rows}
    assert kinds == {
        *("question", "two_facts", "abstract", "dialogue", "short_dialogue", "instruction"),
    }
    for row in rows:
        [turn] = row["messages"]
        for reference in row["about"]["passages"]:
            passage = Passage(reference["text"], reference["start"], reference["end"])
            assert library.words(passage) in turn["content"]
            assert "{" not in turn["content"].replace(library.words(passage), "")
    share = sum(row["about"]["language"] == "zh" for row in rows) / len(rows)
    assert 0.08 < share < 0.26


def test_make_requests_uses_every_register(library: Library) -> None:
    rows = list(make_requests(library, 600, seed=3))
    asked = {
        library.texts[reference["text"]].register
        for row in rows
        for reference in row["about"]["passages"]
    }
    assert asked == {text.register for text in library.texts}


def test_read_written_refuses_other_texts(
    library: Library, written_rows: list[dict[str, Any]], texts: list[Text]
) -> None:
    changed = [dataclasses.replace(text, text=text.text[1:]) for text in texts]
    with pytest.raises(ValueError, match="found another; give the --texts"):
        read_written(written_rows, Library(changed, {}))
