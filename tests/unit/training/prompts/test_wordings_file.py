"""The wordings: how many there are, that each can be filled, and where each may stand."""

import json
import random
import re
from pathlib import Path

import pytest

import training.prompts
from training.prompts.kinds.drawing import fill
from training.prompts.wordings_file import Wording, all_wordings, choose, labels, phrases, wordings

WORDINGS = Path(training.prompts.__file__).with_name("wordings")
_FIELDS = {
    *("question", "abstract", "label", "quote", "name", "request", "row", "column", "other"),
    *("labels", "language", "path", "piece", "tag", "items", "words", "n"),
    *("key", "value", "time", "place"),
}


def test_there_are_three_hundred_wordings_and_many_in_chinese() -> None:
    distinct = {(wording.lead, wording.ask) for _, _, wording in all_wordings()}
    assert len(distinct) >= 300
    assert sum(language == "zh" for _, language, _ in all_wordings()) >= 100


def test_wordings_hold_known_fields_alone() -> None:
    for kind, language, wording in all_wordings():
        named = set(re.findall(r"\{(\w+)\}", wording.lead + wording.ask))
        assert named <= _FIELDS, (kind, language, named)


def test_wordings_are_in_their_language() -> None:
    for kind, language, wording in all_wordings():
        words = re.sub(r"\{\w+\}", "", wording.lead + wording.ask)
        chinese = bool(re.search(r"[\u4e00-\u9fff]", words))
        assert not words.strip() or chinese == (language == "zh"), (kind, words)


def test_choose_keeps_words_like_above_from_standing_before_the_text() -> None:
    rng = random.Random(0)
    drawn = {choose(rng, "single_qa", "en", precede=True) for _ in range(400)}
    assert all("above" not in wording.ask for wording in drawn)
    assert any("above" in wording.ask for wording in wordings("single_qa", "en"))


def test_may_precede_and_follow() -> None:
    assert not Wording("", "Given the text above, go").may_precede
    assert not Wording("", "Answer from the following.").may_follow
    assert Wording("", "{question}").may_precede


def test_wordings_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="expected wordings of nothing in en"):
        wordings("nothing", "en")


def test_fill_leaves_braces_of_the_material_alone() -> None:
    assert fill("{question} of {row}", {"question": "a {row}?", "x": "y"}) == "a {row}? of {row}"


def test_phrases_come_in_both_languages() -> None:
    assert phrases("heads", "en")
    assert phrases("heads", "zh")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_kind_of_answer_asked_for_has_a_label(language: str) -> None:
    writer = json.loads((WORDINGS / "writer.json").read_text("utf-8"))
    assert labels("answer_types", language).keys() == writer[language]["answer_types"].keys()
