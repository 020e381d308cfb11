"""Agreement with full attention's answers.

Oracle: distributions small enough to be written out, in float64.
"""

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_tasks.agreement import Teacher, compare, divergence
from benchmarks.real_tasks.engine import Answer


def _logs(probabilities: dict[int, float]) -> dict[int, float]:
    return {token: math.log(value) for token, value in probabilities.items()}


ONE = _logs({1: 0.7, 2: 0.2})
SAME_FIRST = _logs({1: 0.6, 3: 0.3})
OTHER_FIRST = _logs({2: 0.6, 1: 0.3})


def test_divergence_merges_what_only_one_side_names() -> None:
    # Named by both: 1. All else: 0.3 against 0.4.
    expected = 0.7 * math.log(0.7 / 0.6) + 0.3 * math.log(0.3 / 0.4)
    assert divergence(ONE, SAME_FIRST) == pytest.approx(expected, rel=1e-5)
    expected = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.6)
    assert divergence(ONE, OTHER_FIRST) == pytest.approx(expected, rel=1e-5)  # the rest: 0.1 each


def test_divergence_of_a_distribution_from_itself_is_zero() -> None:
    assert divergence(ONE, ONE) == 0.0
    certain = {5: 0.0, 6: -30.0}
    assert divergence(certain, certain) == 0.0


def test_divergence_wants_the_decoded_token_named_by_both() -> None:
    with pytest.raises(ValueError, match="without one in common"):
        divergence({1: -0.1}, {2: -0.1})


def test_divergence_is_at_most_that_of_the_whole_distributions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = rng.dirichlet(np.full(64, 0.2), size=2) + 1e-9
        whole = float((one * np.log(one / other)).sum())
        tops = [
            _logs({int(token): float(p[token]) for token in np.argsort(-p)[:20]})
            for p in (one, other)
        ]
        assert -1e-9 <= divergence(*tops) <= whole + 1e-4


def test_compare_counts_equal_tokens_and_the_prefix() -> None:
    found = compare([ONE] * 4, [SAME_FIRST, SAME_FIRST, OTHER_FIRST, SAME_FIRST])
    assert (found.tokens, found.equal_tokens, found.same_prefix) == (4, 0.75, 0.5)
    expected = (3 * divergence(ONE, SAME_FIRST) + divergence(ONE, OTHER_FIRST)) / 4
    assert found.kl == pytest.approx(expected)
    assert compare([ONE], [ONE]).same_prefix == 1.0


def test_compare_takes_ties_for_equal() -> None:
    tied = _logs({1: 0.4, 2: 0.4})
    assert compare([ONE, OTHER_FIRST], [tied, tied]).equal_tokens == 1.0


def test_compare_refuses_another_length() -> None:
    with pytest.raises(ValueError, match="expected the candidates of 2 positions"):
        compare([ONE, ONE], [ONE])


def _answer(tokens: list[int], tops: list[dict[int, float]]) -> Answer:
    return Answer(
        id="x", text="", token_ids=tokens, finish_reason="stop", top_logprobs=tops
    )  # fmt: skip


def test_teacher_comes_back_as_it_was_written(tmp_path: Path) -> None:
    answers = [_answer([1, 9], [ONE, OTHER_FIRST]), _answer([7], [SAME_FIRST])]
    file = tmp_path / "deep" / "longbench.teacher.npz"
    Teacher.of("abc", answers).write(file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    found = Teacher.read(file, "abc")
    assert found.answers == [[1, 9], [7]]
    assert [len(tops) for tops in found.top_logprobs] == [2, 1]
    assert found.top_logprobs[0][1] == pytest.approx(OTHER_FIRST)
    assert found.top_logprobs[1][0] == pytest.approx(SAME_FIRST)


def test_teacher_of_other_prompts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "longbench.teacher.npz"
    Teacher.of("abc", [_answer([1], [ONE])]).write(file)
    with pytest.raises(
        ValueError, match="expected answers to the prompts of digest xyz, found abc"
    ):
        Teacher.read(file, "xyz")
