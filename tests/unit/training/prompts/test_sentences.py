"""Sentences and slips. Oracle: sentences and names that the tests write themselves."""

import random

import pytest

from training.prompts.kinds.sentences import (
    mentions,
    misspell,
    names_of,
    opening,
    sentences_of,
    squeezed,
    unique_sentences,
)

_FIRST = "The committee of the harbour met Mr. Penrose Adler on Tuesday morning."
_SECOND = '"We have waited for this long enough," said the woman at the door.'
_ENGLISH = f"A HEADING\n\n{_FIRST} {_SECOND}\n\n10 20 30 | 40 50 60 | 70 80 90 | 100 110 120 130.\n"
_CHINESE = (
    "目录\n\n她在信里提到了《长河》这本书，说是朋友送的。后来她说：“我早就读过了，不想再读一遍。”\n"
)


def test_sentences_of_leaves_headings_and_rows_of_numbers_out() -> None:
    assert sentences_of(_ENGLISH, "en") == [_FIRST, _SECOND]


def test_sentences_of_chinese_end_with_their_quotes() -> None:
    found = sentences_of(_CHINESE, "zh")
    assert found == [
        "她在信里提到了《长河》这本书，说是朋友送的。",
        "后来她说：“我早就读过了，不想再读一遍。”",
    ]


def test_sentences_of_joins_broken_lines() -> None:
    assert sentences_of(_FIRST.replace(" ", "\n"), "en") == [_FIRST]


def test_unique_sentences_leave_repeated_openings_out() -> None:
    again = _FIRST.replace("Tuesday", "Monday")
    assert unique_sentences(f"{_FIRST} {_SECOND}\n\n{again}", "en") == [_SECOND]


@pytest.mark.parametrize(
    ("words", "language", "expected"),
    [("one  two\nthree four five six seven", "en", "one two three four five six"),
     ("一二三四五六七八九十", "zh", "一二三四五六七八九")],
)  # fmt: skip
def test_opening_gives_the_first_words(words: str, language: str, expected: str) -> None:
    assert opening(words, language) == expected


def test_mentions_give_the_sentences_that_hold_a_name() -> None:
    text = f"{_FIRST} {_SECOND}\n\nNobody knew then what the others had told Adler about the boats."
    assert "Adler" in names_of(text, "en")
    assert mentions(text, "Adler", "en") == [_FIRST, text.split("\n\n")[1]]
    assert names_of(_CHINESE, "zh") == ["长河"]
    assert len(mentions(_CHINESE, "长河", "zh")) == 1


def test_mentions_refuse_a_name_whose_first_place_is_a_heading_or_another_word() -> None:
    assert mentions(f"ADLER, Adler\n\n{_FIRST}", "Adler", "en") == []
    assert mentions(f"{_FIRST} {_SECOND} Adlerian.", "Adler", "en") == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_misspell_changes_some_words_and_keeps_the_others(language: str) -> None:
    right = _FIRST if language == "en" else "她在信里提到了这本书，说是朋友送的。"
    for seed in range(40):
        wrong = misspell(random.Random(seed), right, language, 2)
        assert wrong != right
        assert wrong == squeezed(wrong)
        assert abs(len(wrong) - len(right)) <= 24
        assert wrong[-1] == right[-1]


def test_misspell_without_slips_returns_the_words() -> None:
    assert misspell(random.Random(0), _FIRST, "en", 0) == _FIRST
