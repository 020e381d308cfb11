"""Where a prompt's end occurs earlier. Oracle: sets of tuples (tests/helpers)."""

import time

import numpy as np
import pytest

from flux_vllm.router.overlap import ENDS, WIDTH, overlap
from tests.helpers.reference_router import overlap_by_sets


@pytest.mark.parametrize("near_tokens", [1, 20, 128, 200, 5000])
@pytest.mark.parametrize("length", [1, 2, 3, 31, 33, 128, 129, 200, 201, 1000])
@pytest.mark.parametrize("words", [2, 9, 150_000])
def test_shares_are_those_of_sets(length: int, near_tokens: int, words: int) -> None:
    ids = np.random.default_rng(length).integers(0, words, length).tolist()
    found = overlap(ids, near_tokens)
    assert found.dtype == np.float32
    assert found.shape == (WIDTH,)
    np.testing.assert_allclose(found, overlap_by_sets(ids, near_tokens), atol=1e-6)


def test_a_repeated_question_shows_where_it_stands() -> None:
    text = list(range(1000, 9000))
    question = list(range(128))
    far = overlap([*question, *text, *question], 2048)
    near = overlap([*text, *question, *text[:500], *question], 2048)
    nowhere = overlap([*text, *question], 2048)
    assert far.tolist() == [1.0] * WIDTH
    assert near.tolist() == [0.0] * WIDTH
    assert nowhere.tolist() == [0.0] * WIDTH


def test_grams_in_another_order_are_others() -> None:
    one, other = [1, 2, 3], [3, 2, 1]
    far = overlap([*one * 20, *range(100, 300), *other], 100)
    width = 2 * len(ENDS)
    assert far[0] > 0  # its single tokens occur
    assert not far[width:].any()


def test_a_long_prompt_takes_milliseconds() -> None:
    ids = np.random.default_rng(0).integers(0, 50_000, 131_072)
    begin = time.perf_counter()
    overlap(ids, 2048)
    assert time.perf_counter() - begin < 0.1  # 2 ms on a machine of its own
