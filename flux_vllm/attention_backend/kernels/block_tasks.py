"""Block tasks: a step's query blocks, what the XAttention kernels run over.

Queries and keys lie on one grid of 128 positions that begins at position 0 of a request, so a chunk
may begin and end within a block. A task is one query block of one row; it has an entry for each
key block from 0 to its own, in buffers that all tasks share.

Dimension legend: R rows, Q tasks, E entries of all tasks.
"""

from typing import NamedTuple

import numpy as np

BLOCK_TOKENS = 128
"""Positions of a query block and of a key block."""

COLUMNS = 3
"""Width of a packed task: row of the batch (-1 for padding), block, first entry."""


class BlockTasks(NamedTuple):
    """The query blocks of a step, on the host."""

    tasks: np.ndarray
    """[Q, COLUMNS] int32; a row's blocks are consecutive and padded to a multiple of the group."""
    num_entries: int
    """E."""
    most_blocks: int
    """Key blocks of the longest row."""


def pack_block_tasks(
    computed: np.ndarray, scheduled: np.ndarray, wanted: np.ndarray, group: int
) -> BlockTasks:
    """List the query blocks of some rows.

    Args:
        computed: [R] position of each row's first query.
        scheduled: [R] queries.
        wanted: [R] bool: the rows to list.
        group: tasks that one program of the score kernel takes, all of one row.
    """
    rows = np.flatnonzero(wanted & (scheduled > 0))
    first = computed[rows] // BLOCK_TOKENS
    stop = -(-(computed[rows] + scheduled[rows]) // BLOCK_TOKENS)
    blocks = stop - first
    padded = -(-blocks // group) * group
    within = np.arange(padded.sum()) - np.repeat(np.cumsum(padded) - padded, padded)
    is_real = within < np.repeat(blocks, padded)
    block = np.where(is_real, np.repeat(first, padded) + within, 0)
    entries = np.where(is_real, block + 1, 0)
    row = np.where(is_real, np.repeat(rows, padded), -1)
    tasks = np.stack([row, block, np.cumsum(entries) - entries], axis=1).astype(np.int32)
    return BlockTasks(tasks, int(entries.sum()), int(stop.max(initial=0)))
