"""What is kept of a writer's answers, and what is not. Oracle: examples written by hand."""

from typing import Any

import pytest

from training.prompts.asking import passage_digest
from training.prompts.passages import Library
from training.prompts.texts import Text
from training.prompts.written import Written, read_written

_EN = "The lighthouse of Marrow Point was built in 1871 by Ida Kern, who kept it for forty years."
_ZH = "马罗角的灯塔建于一八七一年，由伊达修建，她看守了四十年，后来由儿子接手。"


@pytest.fixture
def small() -> Library:
    return Library([Text("book", "a", "t", "en", _EN), Text("book", "b", "t", "zh", _ZH)], {})


def _row(kind: str, answer: str, chinese: bool = False, **about: Any) -> dict[str, Any]:
    text = _ZH if chinese else _EN
    reference = {"text": int(chinese), "start": 0, "end": len(text), "sha256": passage_digest(text)}
    language = "zh" if chinese else "en"
    return {
        "kind": kind,
        "answer": answer,
        "about": {"language": language, "passages": [reference], **about},
    }


def _read(small: Library, *rows: dict[str, Any]) -> Written:
    return read_written(rows, small)


def test_question_is_kept_with_its_type_and_passage(small: Library) -> None:
    answer = "Question: When was the lighthouse of Marrow Point built?\nAnswer: In 1871\nDone!"
    [question] = _read(small, _row("question", answer, answer_type="time")).questions
    assert question.question == "When was the lighthouse of Marrow Point built?"
    assert question.answer == "In 1871"
    assert question.answer_type == "time"
    assert small.words(question.passages[0]) == _EN


def test_chinese_question_is_kept(small: Library) -> None:
    written = _read(
        small, _row("question", "问题：马罗角的灯塔建于哪一年？\n答案：一八七一年", True)
    )
    [question] = written.questions
    assert (question.question, question.answer) == ("马罗角的灯塔建于哪一年？", "一八七一年")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("There was a lighthouse once, long ago.", "form"),
        ("Question: Why?\nAnswer: because", "length"),
        ("Question: Tell me about Marrow Point now.\nAnswer: 1871", "no question"),
        ("Question: When does the passage say it was built?\nAnswer: 1871", "points at the text"),
        ("Question: When did Ida Kern build the tower?\nAnswer: Tuesday morning", "answer not in"),
        (
            "Question: Who was Ida Kern of the lighthouse?\nAnswer: Ida Kern",
            "answer in the question",
        ),
        ("I'm sorry, but I cannot make a question.", "refusal"),
        ("no", "too short"),
        ("Question: 灯塔是什么时候建成的呢，请问各位知道吗？\nAnswer: 1871", "language"),
    ],
)
def test_questions_are_dropped_for_a_reason(small: Library, answer: str, reason: str) -> None:
    written = _read(small, _row("question", answer))
    assert not written.questions
    [dropped] = written.dropped
    assert reason in dropped


def test_what_was_written_before_is_dropped(small: Library) -> None:
    answer = "Question: When was the lighthouse of Marrow Point built?\nAnswer: 1871"
    written = _read(small, _row("question", answer), _row("question", answer.upper()))
    assert len(written.questions) == 1
    assert written.dropped["question: written before"] == 1


def test_abstract_that_copies_is_dropped(small: Library) -> None:
    fresh = "A woman put up a tower with a lamp on a cape, and looked after it most of her life."
    written = _read(small, _row("abstract", _EN), _row("abstract", fresh))
    assert [abstract.words for abstract in written.abstracts] == [fresh]
    assert written.dropped["abstract: copied"] == 1


def test_pieces_of_a_dialogue_are_joined_in_their_order(small: Library) -> None:
    def piece(number: int) -> dict[str, Any]:
        turns = "\n".join(f"**Ruth:** piece {number} line {at}" for at in range(7))
        return _row("dialogue", turns, group="g", number=number)

    [dialogue] = _read(small, piece(1), piece(0)).dialogues
    assert len(dialogue.turns) == 14
    assert dialogue.turns[0] == "Ruth: piece 0 line 0"
    assert dialogue.turns[-1] == "Ruth: piece 1 line 6"


def test_turns_that_say_the_same_again_are_left_out(small: Library) -> None:
    turns = "\n".join(f"Ruth: line {at}" for at in range(7))
    looped = f"{turns}\nTom: line 3\nTom: line 5\nTom: at last"
    [dialogue] = _read(small, _row("dialogue", looped, group="g", number=0)).dialogues
    assert dialogue.turns == (*turns.split("\n"), "Tom: at last")


def test_request_loses_its_heading(small: Library) -> None:
    [request] = _read(small, _row("instruction", "**Request:** Who kept the light?")).instructions
    assert request.words == "Who kept the light?"


def test_short_dialogue_needs_its_summary(small: Library) -> None:
    talk = "\n".join(f"Tom: line {at}" for at in range(6))
    good = f"{talk}\n\nSummary: Tom speaks six lines to nobody."
    written = _read(small, _row("short_dialogue", good), _row("short_dialogue", talk + " no end"))
    [dialogue] = written.short_dialogues
    assert dialogue.summary == "Tom speaks six lines to nobody."
    assert len(dialogue.turns) == 6
    assert written.dropped["short_dialogue: form"] == 1


def test_most_of_usable_answers_are_kept(
    written: Written, written_rows: list[dict[str, Any]]
) -> None:
    assert sum(written.dropped.values()) < 0.2 * len(written_rows)
    assert {question.language for question in written.questions} == {"en", "zh"}
