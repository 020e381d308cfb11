"""What attention over a paged KV cache reads: the cache, and the rows of a batch in it.

Dimension legend: R rows, K kv heads, H head dim, B KV blocks, M table width.
"""

from typing import NamedTuple

import torch


class KVCache(NamedTuple):
    """Keys and values of one layer, views of vLLM's memory."""

    keys: torch.Tensor
    """[B, block_size, K, H], last dimension contiguous, any other strides."""
    values: torch.Tensor
    """Likewise."""
    key_scale: float = 1.0
    """What float8 keys are multiplied by to be what they stand for."""
    value_scale: float = 1.0
    """Likewise."""


class PagedRows(NamedTuple):
    """The rows of an attention call, on the device."""

    block_table: torch.Tensor
    """[any, M] int32: physical blocks; entries past a row's keys are never read."""
    kv_batch_idx: torch.Tensor | None
    """[R] int32 contiguous, the row of `block_table` to read; None where row r reads row r."""
    query_start_loc: torch.Tensor
    """[R + 1] int32: where in the batch each row's queries begin, ascending."""
    seqused_k: torch.Tensor
    """[R] int32 contiguous: keys, this step's queries included; the last is the last query's."""
    seqused_q: torch.Tensor | None = None
    """[R] int32 contiguous: how many queries there are from a row's beginning on, 0 to skip the
    row; None for all."""
