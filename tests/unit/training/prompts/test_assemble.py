"""Final prompts: repeatable, of every kind, as long as drawn. Oracle: the tokenizer's own count."""

import math
import random
import re
from collections import Counter
from typing import Any

import pytest

from training.prompts.answers import render
from training.prompts.assemble import PromptSettings, assemble, draw_tokens
from training.prompts.kinds import KINDS
from training.prompts.kinds.drawing import Draw
from training.prompts.kinds.sums import make_problem
from training.prompts.passages import Library
from training.prompts.written import Written

SETTINGS = PromptSettings(count=1200, seed=7, min_tokens=256, max_tokens=3000)


@pytest.fixture(scope="module")
def rows(library: Library, written: Written, word_tokenizer: Any) -> list[dict[str, Any]]:
    return list(assemble(library, written, word_tokenizer, SETTINGS, workers=1))


def test_assemble_repeats_itself_whatever_the_processes(
    rows: list[dict[str, Any]], library: Library, written: Written, word_tokenizer: Any
) -> None:
    few = PromptSettings(count=24, seed=7, min_tokens=256, max_tokens=3000)
    assert list(assemble(library, written, word_tokenizer, few, workers=2)) == rows[:24]
    other = PromptSettings(count=24, seed=8, min_tokens=256, max_tokens=3000)
    assert list(assemble(library, written, word_tokenizer, other, workers=1)) != rows[:24]


def test_assemble_makes_every_kind(rows: list[dict[str, Any]]) -> None:
    counts = Counter(row["kind"] for row in rows)
    assert set(counts) == {kind.name for kind in KINDS}


def test_a_third_is_local_and_a_part_chinese(rows: list[dict[str, Any]]) -> None:
    assert 0.28 < sum(row["local"] for row in rows) / len(rows) < 0.45
    assert 0.08 < sum(row["language"] == "zh" for row in rows) / len(rows) < 0.26


def test_rows_are_chats_or_raw_prompts(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert bool(row.get("messages")) != bool(row.get("prompt"))
        if row.get("messages"):
            assert row["messages"][-1]["role"] == "user"
            assert all(turn["content"].strip() for turn in row["messages"])
    assert any(row.get("prompt") for row in rows)
    assert any(row.get("messages", [{}])[0].get("role") == "system" for row in rows)
    assert any(len(row.get("messages", [])) > 4 for row in rows)


def test_tokens_are_those_of_the_rendered_prompt(
    rows: list[dict[str, Any]], word_tokenizer: Any
) -> None:
    for row in rows[:60]:
        ids = word_tokenizer(render(row, word_tokenizer), add_special_tokens=False)["input_ids"]
        assert row["tokens"] == len(ids) <= SETTINGS.max_tokens


def test_requests_stand_everywhere(rows: list[dict[str, Any]]) -> None:
    assert {row["position"] for row in rows} == {"end", "start", "both", "middle"}


def test_the_needle_is_in_the_prompt(rows: list[dict[str, Any]], written: Written) -> None:
    kinds = ("single_qa", "multi_qa", "two_document_qa")
    asked = [row for row in rows if row["kind"] in kinds and row["language"] == "en"]
    assert asked
    held = [
        row
        for row in asked
        if row["reference"] in (row.get("prompt") or row["messages"][-1]["content"])
    ]
    assert len(held) == len(asked)


def test_needles_lie_in_every_third_of_the_context(library: Library, written: Written) -> None:
    [make] = [kind.make for kind in KINDS if kind.name == "multi_qa"]
    thirds: Counter[int] = Counter()
    for number in range(60):
        made = make(Draw(random.Random(number), library, written, 2000, "en"))
        [question] = [question for question in written.questions if question.question in made.text][
            :1
        ]
        needle = library.words(question.passages[0])
        assert needle in made.text
        thirds[3 * made.text.index(needle) // len(made.text)] += 1
    assert min(thirds[third] for third in range(3)) >= 8


def test_count_passages_counts_right(library: Library, written: Written) -> None:
    [make] = [kind.make for kind in KINDS if kind.name == "count_passages"]
    made = make(Draw(random.Random(2), library, written, 1500, "en"))
    assert 2 <= int(made.reference) <= 60


def test_draw_tokens_prefers_the_middle() -> None:
    settings = PromptSettings(min_tokens=1024, max_tokens=32000)
    drawn = [draw_tokens(random.Random(number), settings) for number in range(3000)]
    assert min(drawn) >= 1024
    assert max(drawn) <= 32000
    middle = sum(4096 <= tokens <= 16384 for tokens in drawn) / len(drawn)
    expected = 0.55 + 0.45 * math.log(4) / math.log(32000 / 1024)
    assert abs(middle - expected) < 0.04


def test_settings_refuse_a_range_without_room() -> None:
    with pytest.raises(ValueError, match="correct --max_tokens"):
        PromptSettings(min_tokens=4000, max_tokens=1000)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_word_problems_are_solved_right(language: str) -> None:
    rng = random.Random(5)
    for _ in range(60):
        problem = make_problem(rng, language)
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert "{" not in problem.question
        last = problem.steps.split(";")[-1]
        left, _, right = last.partition("=")
        terms = [int(term) for term in re.findall(r"\d+", left)]
        signs = re.findall(r"[-+*]", left)
        value = terms[0]
        for sign, term in zip(signs, terms[1:], strict=True):
            value = {"+": value + term, "-": value - term, "*": value * term}[sign]
        assert value == int(right) == problem.result
        assert set(numbers) <= {int(number) for number in re.findall(r"\d+", problem.steps)}
