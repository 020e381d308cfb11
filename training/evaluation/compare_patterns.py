"""The same router with its SPARSE layers under each of several sparse patterns.

Dimension legend: P prompts.
"""

from typing import Any

import numpy as np

from training.evaluation.scoring import Scores
from training.evaluation.statistics import Cells, interval


def compare(cells: Cells, full: Scores, other: Scores, name: str = "router") -> dict[str, Any]:
    """Compare one policy, of this name, with full attention on the same prompts."""
    share = other.sparse.mean(axis=1)
    groups = cells.by_group(other.score)
    values = {"full": full.score, name: other.score}
    return {
        "share": cells.overall(share),
        "share_by_group": cells.by_group(share),
        "score": cells.overall(other.score),
        "score_by_group": groups,
        "full_by_group": cells.by_group(full.score),
        "of_full": cells.overall(other.score) / max(cells.overall(full.score), 1e-9),
        "intervals": interval(cells, values, "overall"),
    }


def compare_pattern(
    cells: Cells, full: Scores, router: Scores, all_sparse: Scores
) -> dict[str, Any]:
    """Compare with full attention what a router and all SPARSE score under one pattern."""
    return compare(cells, full, router) | {
        "density": mean_density(cells, router),
        "all_sparse_score": cells.overall(all_sparse.score),
        "all_sparse_by_group": cells.by_group(all_sparse.score),
        "all_sparse_density": mean_density(cells, all_sparse),
    }


def mean_density(cells: Cells, scores: Scores) -> float | None:
    """Average the density over prompts that had a SPARSE layer, weighed as scores are.

    Returns: None where no prompt had one.
    """
    known = ~np.isnan(scores.density)
    return cells.where(known).overall(scores.density) if known.any() else None
