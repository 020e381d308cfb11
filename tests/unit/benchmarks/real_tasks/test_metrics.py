"""Metrics of real tasks.

Oracle: values worked out by hand, and the packages that LongBench calls.
"""

import random

import pytest

from benchmarks.real_tasks import metrics
from benchmarks.real_tasks.similarity import edit_similarity, rouge_l


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The  Beatles!", "the Beatles", 1.0),
        ("An apple", "apple pie", 2 * 1 * 0.5 / 1.5),
        ("red red blue", "red blue blue", 2 / 3),
        ("", "apple", 0.0),
        ("the a an", "apple", 0.0),
    ],
)
def test_token_f1(text: str, answer: str, expected: float) -> None:
    assert metrics.token_f1(text, answer) == pytest.approx(expected)


def test_character_f1_ignores_chinese_punctuation_and_space() -> None:
    assert metrics.character_f1("增长了 25.89%。", "增长了，25.89％") == 1.0
    # Four of five characters are right, all four of the answer are found.
    assert metrics.character_f1("增长了很多", "增长很多") == pytest.approx(2 * 0.8 / 1.8)


CLASSES = ["Individual", "Group or organization of person", "Date", "Other location", "Location"]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" Individual\nQuestion: next", "Individual", 1.0),
        ("\n\nDate", "Date", 1.0),
        ("Date or Individual", "Individual", 0.5),
        ("Other location", "Other location", 1.0),  # Location is part of it
        ("Other Location", "Other location", 0.0),
        ("Date\nIndividual", "Individual", 0.0),
    ],
)
def test_class_accuracy(text: str, answer: str, expected: float) -> None:
    assert metrics.class_accuracy(text, answer, CLASSES) == expected


def test_classes_stand_in_the_prompts_examples() -> None:
    prompt = "Question: a\nType: Date\nQuestion: b\nType: Other location\nType: Date\nQ: c\nType:"
    assert metrics.classes_of(prompt) == ["Date", "Other location"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Paragraph 19", 1.0), ("19", 1.0), ("Paragraph 19 or 3", 0.5), ("none", 0.0), ("191", 0.0)],
)
def test_paragraph_share(text: str, expected: float) -> None:
    assert metrics.paragraph_share(text, "Paragraph 19") == expected


def test_paragraph_share_wants_a_number() -> None:
    with pytest.raises(ValueError, match='expected an answer such as "Paragraph 3"'):
        metrics.paragraph_share("3", "the third")


def test_code_similarity_takes_the_first_line_of_code() -> None:
    text = "\n```python\n# a comment\n    if x:\n        pass"
    assert metrics.code_similarity(text, "    if x:") == 1.0
    assert metrics.code_similarity("// nothing else", "x") == 0.0
    assert metrics.code_similarity("ab\nabcd", "abcd") == pytest.approx(2 * 2 / 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 4 = 7, so she has $1,260.", 1.0),
        ("1260.00", 1.0),
        ("The answer is 1260. I am 100% sure", 0.0),
        ("1300-40 makes 1261-1=1260", 1.0),
        ("-1260", 0.0),
        ("nothing", 0.0),
    ],
)
def test_last_number(text: str, expected: float) -> None:
    assert metrics.last_number(text, "1260") == expected


def test_first_result_goes_before_what_follows() -> None:
    assert metrics.first_result("so\n**Result:** 42\nagain\nResult: 41", "42") == 1.0
    assert metrics.first_result("Result: $1,000 in all", "1000") == 1.0
    assert metrics.first_result("first 3, then 42", "42") == 1.0


def test_contained_share_wants_whole_words() -> None:
    assert metrics.contained_share("the code is 47091.", ["47091"]) == 1.0
    assert metrics.contained_share("470915", ["47091"]) == 0.0
    assert metrics.contained_share("Ivory Badger", ["ivory badger"]) == 1.0
    assert metrics.contained_share("1, 3", ["1", "2", "3"]) == pytest.approx(2 / 3)


def test_score_takes_the_best_of_several_answers() -> None:
    assert metrics.score("qasper", "0.05 F1", ["5 percent points.", "0.05 F1"], "") == 1.0
    assert metrics.score("hidden_values", "11", ["11", "22"], "") == 0.5
    assert metrics.score("trec", "Date", ["Date"], "Type: Date\nType:") == 1.0
    assert metrics.score("anything", "text", [], "") is None
    with pytest.raises(ValueError, match="expected a task among .*, found 'unheard'"):
        metrics.score("unheard", "text", ["a"], "")


def test_edit_similarity_by_hand() -> None:
    assert edit_similarity("kitten", "sitting") == pytest.approx(2 * 4 / 13)
    assert edit_similarity("", "abc") == edit_similarity("", "") == 0.0


def test_rouge_l_by_hand() -> None:
    # Of the reference's 5 distinct words "w1 w2" and "w1 w3 w5" are common with one sentence each,
    # together 4; the text has 8 distinct words: w1 w2 w3 w5 w6 w7 w8 w9.
    text, reference = "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"
    precision, recall = 4 / 8, 4 / 5
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(text, reference) == pytest.approx(expected)
    assert rouge_l("", "a") == rouge_l("a", "...") == 0.0


def _texts(count: int, alphabet: str, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60)))

    return [(text(), text()) for _ in range(count)]


def test_edit_similarity_equals_rapidfuzz() -> None:
    fuzz = pytest.importorskip("rapidfuzz.fuzz", reason="rapidfuzz is not installed")
    for one, other in _texts(200, "abcd ().", seed=1):
        assert edit_similarity(one, other) == pytest.approx(fuzz.ratio(one, other) / 100)


def test_rouge_l_equals_the_rouge_package() -> None:
    rouge = pytest.importorskip("rouge", reason="rouge is not installed")
    scorer = rouge.Rouge(metrics=["rouge-l"])
    compared = 0
    for one, other in _texts(300, "abcd   .\n", seed=2):
        if not one.strip(".") or not other.strip("."):
            continue  # the package raises
        expected = scorer.get_scores([one], [other], avg=True)["rouge-l"]["f"]
        assert rouge_l(one, other) == pytest.approx(expected)
        compared += 1
    assert compared > 250
