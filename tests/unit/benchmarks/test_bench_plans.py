"""The batches of `bench_plans`, and how it reads a plan."""

import torch

from benchmarks.bench_plans import SPARSE_KEYS, cases, splits_in


def test_cases_are_what_their_names_say() -> None:
    found = cases()
    assert found["4 x 64K, 1 FULL last"] == [SPARSE_KEYS] * 3 + [65536]
    assert found["1 x 128K"] == [131072]
    shuffled = found["16 x 16K, 8 FULL, shuffled"]
    assert sorted(shuffled) == sorted(found["16 x 16K, 8 FULL last"])
    assert shuffled != found["16 x 16K, 8 FULL last"]
    assert len(found["24 rows, half SPARSE, others 2K to 64K"]) == 24
    assert all(2048 <= n <= 65536 for n in found["48 rows, half SPARSE, others 2K to 64K"])


def test_splits_come_after_the_packed_queries() -> None:
    # Six rows, rounded up to eight entries a part.
    plan = torch.tensor([4] * 6 + [0] * 2 + [1, 2, 3, 4, 5, 6] + [0] * 2 + [8] * 8 + [0])
    assert splits_in(plan, 6) == [1, 2, 3, 4, 5, 6]
