"""Rank correlation. Oracle: ranks written out by hand."""

import numpy as np
import pytest

from training.evaluation.ranks import _ranks, rank_correlation

NEED = np.array([0.1, 0.2, 0.4, 0.8])


def test_equal_values_share_a_rank() -> None:
    assert _ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert _ranks(np.array([5.0, 5.0, 5.0])).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        ([0, 1, 2, 4], 1.0),
        ([4, 3, 2, 0], -1.0),
        # Ranks 1.5, 1.5, 3.5, 3.5 with 1 to 4: covariance 1 over variances 1 and 1.25.
        ([1, 1, 2, 2], round(1.25**-0.5, 4)),
        ([2, 2, 2, 2], None),
    ],
)
def test_correlation_of_full_layers_with_need(full: list[int], expected: float | None) -> None:
    assert rank_correlation(np.array(full), NEED) == expected
