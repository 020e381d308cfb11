"""A step's lists of key blocks, as the XAttention kernels choose and attend them.

Dimension legend: N query heads, R rows of the batch, M table width, Q tasks, E entries.
"""

from typing import NamedTuple

import torch


class BlockLists(NamedTuple):
    """A step's lists of key blocks and the rows of the batch that they are of."""

    block_table: torch.Tensor
    """[>= R, M] int32; entries past a row's keys are never read."""
    query_start_loc: torch.Tensor
    """[R + 1] int32."""
    seqused_q: torch.Tensor
    """[R] int32 on the device: all of the row's queries, or 0 to skip it."""
    seqused_k: torch.Tensor
    """[R] int32: keys, this step's queries included."""
    tasks: torch.Tensor
    """[Q, 3] int32, see BlockTasks."""
    chosen: torch.Tensor
    """[N, E] int32: each task's key blocks, ascending, its own block last."""
    counts: torch.Tensor
    """[N, Q] int32: how many they are."""
