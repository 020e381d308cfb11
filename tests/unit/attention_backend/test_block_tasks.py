"""Query blocks of a step's rows. Oracle: listed block by block, row by row."""

import numpy as np
import pytest

from flux_vllm.attention_backend.kernels.block_tasks import BLOCK_TOKENS, pack_block_tasks


def listed(computed: list[int], scheduled: list[int], wanted: list[bool], group: int) -> list:
    """List tasks and padding: row, block, first entry; then the number of entries."""
    tasks, entry = [], 0
    for row, (start, count, is_wanted) in enumerate(zip(computed, scheduled, wanted, strict=True)):
        blocks = sorted({position // BLOCK_TOKENS for position in range(start, start + count)})
        for block in blocks if is_wanted else ():
            tasks.append([row, block, entry])
            entry += block + 1
        while len(tasks) % group:
            tasks.append([-1, 0, entry])
    return [tasks, entry]


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    ("computed", "scheduled", "wanted"),
    [
        ([0], [1], [True]),
        ([0], [128], [True]),
        ([127], [2], [True]),
        ([300, 0, 0, 640], [700, 90, 0, 1], [True, True, True, True]),
        ([300, 0, 5, 640], [700, 90, 1, 1], [False, True, False, True]),
        ([9], [9], [False]),
        ([], [], []),
    ],
)
def test_tasks(computed: list, scheduled: list, wanted: list, group: int) -> None:
    arrays = np.array(computed, dtype=np.int64), np.array(scheduled, dtype=np.int64)
    found = pack_block_tasks(*arrays, np.array(wanted, dtype=bool), group)
    assert [found.tasks.tolist(), found.num_entries] == listed(computed, scheduled, wanted, group)
    assert found.tasks.dtype == np.int32
    assert found.most_blocks == max(
        (task[1] + 1 for task in found.tasks.tolist() if task[0] >= 0), default=0
    )
