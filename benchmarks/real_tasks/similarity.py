"""Longest common subsequences: ROUGE-L and edit similarity as LongBench computes them.

Both equal the packages that LongBench calls (`rouge` 1.0.1; `fuzz.ratio`, not rounded to whole
percents), which need not be installed where answers are scored.
"""

from collections.abc import Sequence


def edit_similarity(text: str, other: str) -> float:
    """Return 2 x LCS / (sum of lengths), by character; 0 where one is empty."""
    if not text or not other:
        return 0.0
    return 2 * _table(text, other)[-1][-1] / (len(text) + len(other))


def rouge_l(text: str, reference: str) -> float:
    """Return the F measure of ROUGE-L over a summary's sentences, by distinct word.

    For each pair of sentences one longest common subsequence; what counts is how many distinct
    words they hold together, of the distinct words of either text. Sentences end at full stops.
    """
    ours, theirs = _sentences(text), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    common: set[str] = set()
    for sentence in theirs:
        for other in ours:
            common.update(_common_words(sentence, other))
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    precision = len(common) / len({word for sentence in ours for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    # What holds nothing but space, such as a line break at the end, is a sentence of one empty
    # word in the package too.
    return [part.split() or [""] for part in text.split(".") if part]


def _common_words(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Return the words of a longest common subsequence; of several, the package's choice."""
    table = _table(one, other)
    row, column = len(one), len(other)
    words = []
    while row and column:
        if one[row - 1] == other[column - 1]:
            words.append(one[row - 1])
            row, column = row - 1, column - 1
        elif table[row - 1][column] > table[row][column - 1]:
            row -= 1
        else:
            column -= 1
    return words


def _table(one: Sequence[str], other: Sequence[str]) -> list[list[int]]:
    """Return the LCS's length of every pair of prefixes, [len(one) + 1][len(other) + 1]."""
    table = [[0] * (len(other) + 1)]
    for item in one:
        above, row = table[-1], [0]
        for column, found in enumerate(other):
            row.append(above[column] + 1 if item == found else max(above[column + 1], row[-1]))
        table.append(row)
    return table
