"""Score an answer by its task's metric: LongBench's own, and those of needles and GSM8K.

Scores lie in [0, 1]. Where a sample has several right answers, the best one counts.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from benchmarks.real_tasks.similarity import edit_similarity, rouge_l

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE_PUNCTUATION = str.maketrans(
    "",
    "",
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"
    + "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏",
)
# A sign belongs to a number that follows nothing: 5-3 is no number below zero.
_NUMBER = re.compile(r"(?:(?<!\w)-)?\d[\d,]*(?:\.\d+)?")


def token_f1(text: str, answer: str) -> float:
    """Return the F1 of words, after lower-casing and dropping punctuation and articles."""

    def words(value: str) -> list[str]:
        return _ARTICLES.sub(" ", value.lower().translate(_PUNCTUATION)).split()

    return _f1(words(text), words(answer))


def character_f1(text: str, answer: str) -> float:
    """Return the F1 of characters, for Chinese: lower case, no punctuation, no space."""

    def characters(value: str) -> list[str]:
        return list("".join(value.lower().translate(_CHINESE_PUNCTUATION).split()))

    return _f1(characters(text), characters(answer))


def _f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def class_accuracy(text: str, answer: str, classes: Sequence[str]) -> float:
    """Say whether the first line names the right class; several named ones share the point.

    Args:
        text: the model's.
        answer: right class.
        classes: all there are. One whose name is part of the right one's is not held against the
            text.
    """
    line = _first_line(text)
    named = {name for name in classes if name in line and name not in answer}
    return 1 / (1 + len(named)) if answer in line else 0.0


def classes_of(prompt: str) -> list[str]:
    """Return the distinct classes of a prompt's examples, the lines `Type: CLASS`."""
    found = re.findall(r"^Type: *(\S.*?) *$", prompt, flags=re.MULTILINE)
    return list(dict.fromkeys(found))


def paragraph_share(text: str, answer: str) -> float:
    """Return the share of the numbers named that are the right paragraph's.

    Raises: ValueError: the right answer has no number.
    """
    right = re.search(r"Paragraph (\d+)", answer)
    if right is None:
        raise ValueError(f'expected an answer such as "Paragraph 3", found {answer!r}')
    numbers = re.findall(r"\d+", text)
    return numbers.count(right[1]) / len(numbers) if numbers else 0.0


def code_similarity(text: str, answer: str) -> float:
    """Return the edit similarity of the first line that is code: no fence, no comment."""
    for line in text.lstrip("\n").split("\n"):
        if not any(mark in line for mark in ("`", "#", "//")):
            return edit_similarity(line, answer)
    return 0.0


def last_number(text: str, answer: str) -> float:
    """Say whether the text's last number is the right one."""
    numbers = _NUMBER.findall(text)
    return float(bool(numbers) and _value(numbers[-1]) == _value(answer))


def first_result(text: str, answer: str) -> float:
    """Say whether the number of the first line `Result: NUMBER` is right.

    What a model writes after it was to end does not count. Where there is no such line, the last
    number does.
    """
    result = re.search(rf"Result\W*?({_NUMBER.pattern})", text)
    return last_number(result[1] if result else text, answer)


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def contained_share(text: str, answers: Sequence[str]) -> float:
    """Return the share of values that the text names as whole words, whatever the case."""
    found = [
        re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, flags=re.IGNORECASE) is not None
        for value in answers
    ]
    return sum(found) / len(found)


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


_OF_TASK: dict[str, Callable[[str, str], float]] = {
    "qasper": token_f1,
    "hotpotqa": token_f1,
    "multifieldqa_zh": character_f1,
    "gov_report": rouge_l,
    "multi_news": rouge_l,
    "passage_retrieval_en": paragraph_share,
    "lcc": code_similarity,
    "gsm8k": last_number,
    "gsm8k_list": last_number,
    "chain_of_thought": first_result,
}
NEEDLE_TASKS = ("hidden_value", "hidden_phrase", "hidden_values")
"""Tasks in which all of a sample's answers are wanted."""


def score(task: str, text: str, answers: Sequence[str], prompt: str) -> float | None:
    """Score one answer.

    Args:
        task: names the metric.
        text: the model's answer.
        answers: right ones; none: there is nothing to score.
        prompt: as it was asked, before any cut.

    Returns: the score; None without right answers.
    Raises: ValueError: no metric is known for the task.
    """
    if not answers:
        return None
    if task in NEEDLE_TASKS:
        return contained_share(text, answers)
    if task == "trec":
        classes = classes_of(prompt)
        return max(class_accuracy(text, answer, classes) for answer in answers)
    if task not in _OF_TASK:
        known = sorted([*_OF_TASK, *NEEDLE_TASKS, "trec"])
        raise ValueError(f"expected a task among {known}, found {task!r}; give it a metric here")
    return max(_OF_TASK[task](text, answer) for answer in answers)
