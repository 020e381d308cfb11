"""Kinds on structured material. Oracle: the material itself, read line by line."""

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from training.prompts.kinds import (
    changes,
    dated,
    entries_on,
    program_files,
    programs,
    records,
    reference_works,
)
from training.prompts.kinds.drawing import Draw, Kind, Made
from training.prompts.kinds.entries import Ask, estimate_tokens
from training.prompts.kinds.pieces import identifiers, people, sentence
from training.prompts.passages import Library
from training.prompts.written import Written

MODULES = (changes, dated, entries_on, program_files, programs, records, reference_works)
KINDS = [kind for module in MODULES for kind in module.KINDS]
ASKING = [(module, kind) for module in MODULES for kind in module.KINDS if not kind.local]
MadeOf = Callable[[Kind, int, int, str], Made]
Looked = Callable[[Any, Kind, int, str], tuple[str, list[Ask]]]


@pytest.fixture
def made_of(library: Library, written: Written) -> MadeOf:
    """Give a maker of prompts by kind, seed, length and language."""

    def make(kind: Kind, seed: int, tokens: int, language: str) -> Made:
        for at in range(8):
            rng = random.Random(f"{seed}/{at}")
            made = kind.make(Draw(rng, library, written, tokens, language))
            if made:
                return made
        raise AssertionError(f"{kind.name} was not made of {tokens} tokens in {language}")

    return make


@pytest.fixture
def looked(library: Library, written: Written, monkeypatch: pytest.MonkeyPatch) -> Looked:
    """Give a kind's material and all requests that it could be followed by."""

    def look(module: Any, kind: Kind, seed: int, language: str) -> tuple[str, list[Ask]]:
        seen: list[tuple[str, list[Ask]]] = []

        def asked(
            draw: Draw, parts: list[str], asks: list[Ask], fence: str | None = None
        ) -> Made | None:
            seen.append(("\n\n".join(parts), asks))
            return None

        monkeypatch.setattr(module, "asked", asked)
        for at in range(8):
            kind.make(Draw(random.Random(f"{seed}/{at}"), library, written, 1500, language))
            if seen:
                return seen[-1]
        raise AssertionError(f"{kind.name} asks nothing in {language}")

    return look


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_material_grows_with_the_drawn_length(kind: Kind, language: str, made_of: MadeOf) -> None:
    short = sum(len(made_of(kind, seed, 1000, language).text) for seed in range(4))
    long = sum(len(made_of(kind, seed, 8000, language).text) for seed in range(4))
    assert long > 3 * short


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_chinese_prompts_are_chinese(kind: Kind, made_of: MadeOf) -> None:
    made = [made_of(kind, seed, 800, "zh") for seed in range(6)]
    # A file to go on with holds no request; code is not Chinese, what is asked about it is.
    asked = [each for each in made if each.messages]
    assert asked
    assert all(re.search(r"[\u4e00-\u9fff]{3}", each.text) for each in asked)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("module", "kind"), ASKING, ids=lambda value: getattr(value, "name", ""))
def test_references_stand_in_the_material_or_are_counted(
    module: Any, kind: Kind, language: str, looked: Looked
) -> None:
    for seed in range(6):
        material, asks = looked(module, kind, seed, language)
        assert all(ask.wording.startswith(kind.name) for ask in asks)
        for ask in asks:
            name = ask.wording.partition("/")[2]
            if name in ("count", "total", "query"):
                continue
            # Lists, days with times and paths are made of several pieces of the material.
            for piece in re.split(r"[\s;,/]+", ask.reference):
                assert piece in material, (ask, piece)


@pytest.mark.parametrize(("module", "kind"), ASKING, ids=lambda value: getattr(value, "name", ""))
def test_requests_name_what_is_in_the_material(module: Any, kind: Kind, looked: Looked) -> None:
    for seed in range(4):
        material, asks = looked(module, kind, seed, "en")
        for ask in asks:
            for name in ("quote", "time", "path", "place"):
                for piece in ask.fields.get(name, "").split("/"):
                    assert piece in material, (ask.wording, name)


def _ask(asks: list[Ask], wording: str) -> Ask | None:
    return next((ask for ask in asks if ask.wording == wording), None)


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def test_program_log_counts_errors_and_finds_the_crash(looked: Looked) -> None:
    counted = 0
    for seed in range(12):
        material, asks = looked(program_files, _kind("program_log"), seed, "en")
        lines = material.split("\n")
        [crash] = [at for at, line in enumerate(lines) if "FATAL" in line]
        before = _ask(asks, "program_log/before")
        assert before
        assert before.reference in lines[crash - 1]
        ask = _ask(asks, "program_log/count")
        if ask:
            counted += 1
            own = [line for line in lines if re.search(rf"\b{ask.fields['name']}\b", line)]
            errors = [line for line in own if re.search(r"\bERROR\b", line)]
            assert len(errors) >= int(ask.reference) > 0
    assert counted > 3


def test_payments_are_added_up(looked: Looked) -> None:
    added = 0
    for seed in range(12):
        material, asks = looked(records, _kind("payments"), seed, "en")
        ask = _ask(asks, "payments/total")
        if not ask:
            continue
        added += 1
        own = [line for line in material.split("\n") if ask.fields["name"] in line]
        cents = [round(100 * float(re.findall(r"\d+\.\d\d\b", line)[-1])) for line in own]
        assert sum(cents) == round(100 * float(ask.reference))
        count, largest = _ask(asks, "payments/count"), _ask(asks, "payments/largest")
        assert count
        assert largest
        assert len(own) == int(count.reference)
        assert largest.reference in own[cents.index(max(cents))]
    assert added > 3


def test_records_and_answers_are_counted(looked: Looked) -> None:
    counted = 0
    for seed in range(16):
        material, asks = looked(records, _kind("records"), seed, "en")
        count, which = _ask(asks, "records/count"), _ask(asks, "records/which")
        if count and which:
            assert material.count(count.fields["name"]) == int(count.reference)
            assert which.reference.count(", ") < int(count.reference)
        material, asks = looked(records, _kind("survey"), seed, "en")
        for ask in asks:
            said = f"- {ask.fields.get('question')} {ask.fields.get('value')}\n"
            if ask.wording == "survey/count" and said in material:
                counted += 1
                assert material.count(said) == int(ask.reference)
    assert counted > 3


def test_an_appointment_is_where_it_was_moved_to_last(looked: Looked) -> None:
    for seed in range(8):
        material, asks = looked(dated, _kind("appointment"), seed, "en")
        ask = _ask(asks, "appointment/when")
        assert ask
        day, _, time = ask.reference.partition(" ")
        last = material[material.rindex(f'"{ask.fields["value"]}"') :][:200]
        said = [
            paragraph for paragraph in material.split("\n\n") if ask.fields["value"] in paragraph
        ]
        assert day in said[-1], last
        assert time in said[-1]


def test_the_files_of_a_folder_are_counted(looked: Looked) -> None:
    for seed in range(8):
        material, asks = looked(reference_works, _kind("file_tree"), seed, "zh")
        ask, listed = _ask(asks, "file_tree/count"), _ask(asks, "file_tree/list")
        if ask:
            assert listed
            assert listed.reference.count(", ") + 1 == int(ask.reference)
            assert all(name in material for name in listed.reference.split(", "))


def test_the_query_joins_by_the_key_that_the_schema_has(looked: Looked) -> None:
    material, asks = looked(programs, _kind("database_schema"), 1, "en")
    ask = _ask(asks, "database_schema/query")
    assert ask
    [key] = re.findall(r"ON c\.(\w+) = p\.id", ask.reference)
    assert key in material
    assert ask.fields["name"] in ask.reference


def test_last_change_ends_with_the_change_asked_about(made_of: MadeOf) -> None:
    made = made_of(_kind("last_change"), 3, 2000, "en")
    assert made.text.count("@@ -") >= 2
    assert max(made.text.rfind("+++ b/"), made.text.rfind("@@ -")) > 0.7 * len(made.text)


def test_next_entry_hides_the_entry_that_comes_next(made_of: MadeOf) -> None:
    for seed in range(6):
        made = made_of(_kind("next_entry"), seed, 1200, "en")
        assert made.reference
        assert not made.text.rstrip().endswith(made.reference)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_people_and_identifiers_are_drawn_once(
    language: str, library: Library, written: Written
) -> None:
    draw = Draw(random.Random(1), library, written, 1000, language)
    for stream in (people(draw), identifiers(draw)):
        drawn = [next(stream) for _ in range(1500)]
        assert len(set(drawn)) == 1500


def test_sentences_are_of_the_asked_length(library: Library, written: Written) -> None:
    draw = Draw(random.Random(1), library, written, 1000, "en")
    drawn = [sentence(draw, 90) for _ in range(40)]
    assert all(50 <= len(words) <= 90 and words.endswith(".") for words in drawn)


def test_estimate_tokens_counts_digits_one_by_one() -> None:
    assert estimate_tokens("2024 2025") == 8
    assert estimate_tokens("word") == 1
    assert estimate_tokens("文字") == 1.5
