"""How many keys the queries of a batch's rows attend to, counted without the data.

Dimension legend: R requests.
"""

import numpy as np


def full_keys(computed: np.ndarray, scheduled: np.ndarray) -> np.ndarray:
    """Sum the keys FULL attention visits over each row's queries: [R] int64."""
    return scheduled * computed + scheduled * (scheduled + 1) // 2


def sparse_prefill_keys(computed: np.ndarray, scheduled: np.ndarray, most_keys: int) -> np.ndarray:
    """Sum the keys exact SPARSE attention visits: [R] int64.

    Args:
        computed: [R] position of each row's first query.
        scheduled: [R] queries.
        most_keys: sink_tokens + window_tokens; a query at position p visits min(p + 1, most_keys).
    """
    growing = (most_keys - computed).clip(0, scheduled)
    return full_keys(computed, growing) + (scheduled - growing) * most_keys


def sparse_decode_keys(
    computed: np.ndarray,
    scheduled: np.ndarray,
    block_size: int,
    sink_tokens: int,
    window_tokens: int,
) -> np.ndarray:
    """Sum the keys SPARSE decode visits, edges widened to whole blocks: [R] int64."""
    sink_blocks = -(-sink_tokens // block_size)
    window_block = (computed - window_tokens + 1).clip(0) // block_size
    skipped = (window_block - sink_blocks).clip(0) * block_size
    return full_keys(computed - skipped, scheduled)
