"""Kinds on prose: length, language, and what their references say.

Oracle: the texts of the prompts themselves, cut anew in the tests.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from training.prompts.kinds import composing, numbered, reading, turns
from training.prompts.kinds.drawing import Draw, Kind, Made
from training.prompts.kinds.sentences import squeezed
from training.prompts.passages import Library
from training.prompts.written import Written

KINDS = [kind for module in (reading, numbered, composing, turns) for kind in module.KINDS]
CASES = [(kind, language) for kind in KINDS for language in kind.languages]
_IDS = [f"{kind.name}-{language}" for kind, language in CASES]
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
Maker = Callable[..., list[Made]]


@pytest.fixture
def make(library: Library, written: Written) -> Maker:
    """Give a maker of several prompts of a kind, those that could be made."""

    def made_of(kind: Kind | str, language: str, tokens: int = 1500, count: int = 12) -> list[Made]:
        if isinstance(kind, str):
            [kind] = [known for known in KINDS if known.name == kind]
        drawn = [
            kind.make(
                Draw(random.Random(f"{seed}/{kind.name}"), library, written, tokens, language)
            )
            for seed in range(count)
        ]
        found = [made for made in drawn if made]
        assert 2 * len(found) >= count, f"{len(found)} of {count} draws made {kind.name}"
        return found

    return made_of


def _middle(values: list[int]) -> int:
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize(("kind", "language"), CASES, ids=_IDS)
def test_prompts_grow_with_the_drawn_length(
    kind: Kind, language: str, make: Maker, word_tokenizer: Any
) -> None:
    def tokens(wanted: int) -> int:
        texts = [made.text for made in make(kind, language, wanted, 9)]
        return _middle([len(ids) for ids in word_tokenizer(texts)["input_ids"]])

    short, long = tokens(1000), tokens(8000)
    assert long > 3 * short
    assert 400 < short < 3000
    assert 3500 < long < 12000


@pytest.mark.parametrize(("kind", "language"), CASES, ids=_IDS)
def test_prompts_are_in_their_language_and_without_open_braces(
    kind: Kind, language: str, make: Maker
) -> None:
    for made in make(kind, language):
        share = len(_CHINESE.findall(made.text)) / len(made.text)
        assert (share > 0.5) == (language == "zh")
        assert not re.search(
            r"\{(?:quote|other|name|n|words|items|piece|question|label)\}", made.text
        )
        assert 24 <= made.max_new_tokens <= 256
        assert bool(made.messages) != bool(made.prompt)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_finish_sentence_goes_on_as_the_text_does(language: str, make: Maker) -> None:
    for made in make("finish_sentence", language):
        joined = squeezed(made.text)
        assert made.reference.endswith((".", "。"))
        assert made.reference in joined


@pytest.mark.parametrize("language", ["en", "zh"])
def test_gap_is_filled_by_the_word_of_the_text(language: str, make: Maker) -> None:
    for made in make("gap", language):
        blank = next(mark for mark in ("_______", "____", "(...)", "[?]") if mark in made.text)
        line = next(line for line in made.text.split("\n") if blank in line)
        before, _, after = line.rpartition(blank)
        whole = f"{before[-8:]}{made.reference}{after[:1]}"
        assert whole in squeezed(made.text)


def test_which_first_names_the_earlier_of_two_sentences(make: Maker) -> None:
    last = [made for made in make("which_first", "en", count=20) if made.position == "end"]
    assert len(last) > 3
    for made in last:
        joined = squeezed(made.text)
        sentences = re.findall(r"[A-Z][a-z ]+(?:[A-Z][a-z]+)?\.", joined)
        twice = {sentence for sentence in sentences if sentences.count(sentence) > 1}
        [other] = twice - {made.reference}
        assert joined.index(made.reference) < joined.index(other)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_mention_quotes_the_first_or_the_last_sentence_with_the_name(
    language: str, make: Maker
) -> None:
    names = re.compile("Orlando|Wilhelmina|Kasimir|Quentin|Yolanda|Zachary|长河|雪山|风铃|黑马")
    ends = set()
    last = [made for made in make("mention", language, 2500, 20) if made.position == "end"]
    for made in last:
        assert made.reference.endswith((".", "。"))
        # The request is the last paragraph and names the name once more.
        material, _, ask = made.text.rpartition("\n\n")
        [name] = {name for name in names.findall(ask) if name in made.reference}
        joined = squeezed(material)
        begin = joined.index(made.reference)
        places = range(begin, begin + len(made.reference))
        if joined.index(name) in places:
            ends.add("first")
        else:
            assert joined.rindex(name) in places
            ends.add("last")
    assert ends == {"first", "last"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_true_or_false_is_right_where_the_right_answer_is_claimed(
    language: str, make: Maker, written: Written
) -> None:
    verdicts = set()
    for made in make("true_or_false", language, 1500, 30):
        if made.position != "end":
            continue
        ask = made.text.rpartition("\n\n")[2]
        [question] = [found for found in written.questions if found.question in ask]
        right = question.answer in ask.replace(question.question, "")
        assert made.reference == ("right" if right else f"wrong: {question.answer}")
        verdicts.add(right)
    assert verdicts == {True, False}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_choices_hold_the_right_answer_once(language: str, make: Maker, written: Written) -> None:
    answers = {question.answer for question in written.questions}
    for made in make("choices", language):
        assert made.text.count(made.reference) >= 1
        assert any(made.reference.endswith(answer) for answer in answers)


def test_wrong_answer_is_another_and_near(library: Library, written: Written) -> None:
    for question in written.questions[:40]:
        draw = Draw(random.Random(1), library, written, 1000, question.language)
        wrong = reading.wrong_answer(draw, question)
        assert wrong
        assert wrong not in question.answer
        own = library.texts[question.passages[0].text_index].source
        same_work = [
            other
            for other in written.questions
            if other.answer == wrong and library.texts[other.passages[0].text_index].source == own
        ]
        nearer = [
            other
            for other in written.questions
            if other.answer_type == question.answer_type
            and library.texts[other.passages[0].text_index].source == own
            and other.answer not in question.answer
            and question.answer not in other.answer
        ]
        assert same_work or not nearer


def test_cross_language_asks_in_the_other_language(make: Maker) -> None:
    asked = " ".join(made.text for made in make("cross_language", "zh"))
    assert "English" in asked
    assert "中文" in " ".join(made.text for made in make("cross_language", "en"))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["next_passage", "odd_passage", "passage_twice", "support"])
def test_labels_of_references_stand_before_passages(kind: str, language: str, make: Maker) -> None:
    for made in make(kind, language):
        for label in made.reference.split(", "):
            assert re.search(rf"(?:^|\n|：|\|){re.escape(label)}", made.text), label


def test_next_passage_follows_in_its_text(make: Maker, library: Library) -> None:
    for made in make("next_passage", "en"):
        quote = re.search(r'"([A-Z][a-z]+(?: [A-Za-z]+){5})|: "([^"]+) \.\.\."', made.text)
        assert quote
        opening = next(filter(None, quote.groups())).removesuffix(" ...")
        label = re.escape(made.reference)
        following = squeezed(re.split(rf"{label}[:\]]?\s+", made.text, maxsplit=1)[1])[:60]
        [text] = [squeezed(text.text) for text in library.texts if opening in squeezed(text.text)]
        assert text.index(opening) < text.index(following)


def test_odd_passage_is_of_another_work_and_stands_anywhere(make: Maker, library: Library) -> None:
    places = []
    for made in make("odd_passage", "en", 3000):
        place = re.search(rf"(?:^|\n){re.escape(made.reference)}[:\]]?\s+", made.text)
        assert place
        sentence = re.match(r"[A-Z][^.]+\.", made.text[place.end() :])
        assert sentence
        [own] = {text.source for text in library.texts if sentence[0] in text.text}
        others = {
            text.source
            for text in library.texts
            for paragraph in text.text.split("\n\n")
            if paragraph in made.text and text.source != own
        }
        assert len(others) == 1
        places.append(place.start() / len(made.text))
    assert min(places) < 0.3
    assert max(places) > 0.5


def test_passage_twice_stands_twice(make: Maker) -> None:
    for made in make("passage_twice", "en"):
        first, second = made.reference.split(", ")
        begun = [
            squeezed(re.split(rf"{re.escape(label)}[:\]]?\s+", made.text)[-1])[:80]
            for label in (first, second)
        ]
        assert begun[0] == begun[1]


def test_support_labels_the_passage_of_the_question(
    make: Maker, library: Library, written: Written
) -> None:
    for made in make("support", "en"):
        [question] = [found for found in written.questions if found.question in made.text]
        own = library.words(question.passages[0])
        assert re.search(
            rf"(?:^|\n){re.escape(made.reference)}[:\]]?\s+{re.escape(own)}", made.text
        )


def test_several_questions_have_an_answer_each(make: Maker, written: Written) -> None:
    asked = {question.question for question in written.questions}
    for made in make("several_questions", "en"):
        shown = [question for question in asked if question in made.text]
        assert len(shown) == len(made.reference.split("\n")) >= 2
        assert all(answer in made.text for answer in made.reference.split("\n"))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_correction_ends_with_doubt_about_the_answer(language: str, make: Maker) -> None:
    rights = []
    for made in make("correction", language, 1500, 30):
        assert [turn["role"] for turn in made.messages[-3:]] == ["user", "assistant", "user"]
        rights.append(made.messages[-2]["content"] == made.reference)
    assert 0 < sum(rights) < 0.6 * len(rights)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_rules_first_puts_all_rules_into_the_system_message(language: str, make: Maker) -> None:
    for made in make("rules_first", language):
        system, user = made.messages
        assert system["role"] == "system"
        assert len(user["content"]) < 400
        _, *rules = made.reference.split("\n")
        assert rules
        assert all(rule in system["content"] for rule in rules)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_new_document_holds_its_answer_in_the_last_turn(language: str, make: Maker) -> None:
    for made in make("new_document", language, 3000):
        last = made.messages[-1]["content"]
        assert made.reference in last
        assert len(last) < 0.7 * len(made.text)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_proofread_shows_the_reference_with_slips_near_the_end(language: str, make: Maker) -> None:
    for made in make("proofread", language):
        wrong = made.text.split("\n\n")[-2]
        assert wrong != made.reference
        assert abs(len(wrong) - len(made.reference)) < 90
        assert made.text.split("\n\n").index(wrong) > 2


@pytest.mark.parametrize("language", ["en", "zh"])
def test_proofread_chat_returns_right_sentences(language: str, make: Maker) -> None:
    for made in make("proofread_chat", language, 3000):
        turns_ = [turn for turn in made.messages if turn["role"] != "system"]
        assert [turn["role"] for turn in turns_] == ["user", "assistant"] * (len(turns_) // 2) + [
            "user"
        ]
        pairs = list(zip(turns_[::2], turns_[1::2], strict=False))
        same = sum(said["content"] == back["content"] for said, back in pairs)
        assert same < 0.7 * len(pairs)


def test_mail_reply_names_a_subject_that_is_there(make: Maker) -> None:
    for made in make("mail_reply", "en"):
        assert re.search(r"mail \d", made.text)
