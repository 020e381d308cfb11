"""Pool the routed rows on the GPU, in one layer or many, once `query_sums` has been updated.

A launch of its own, because a row may pool what another row of the same step has just written:
rows share blocks of the prefix cache.

Dimension legend: L layers, P prompt rows, H head dim, G granules of the KV cache, M block-table
width, E workspace entries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.prompt_rows import (
    PromptRowBuffers,
    physical_granule,
    pool_ends,
    pool_slots,
    pooled_range,
)
from flux_vllm.attention_backend.kernels.tiles import power_of_two
from flux_vllm.router.features import GRANULE_TOKENS

_GRANULE = tl.constexpr(GRANULE_TOKENS)


class PoolingWorkspace(NamedTuple):
    """What one launch hands to the next; with P entries, one serves all layers in turn."""

    parts: torch.Tensor
    """[E, ENDS, SLOTS, H] float32: this step's share of each pooled granule, at the prompt's end
    and, where ENDS is 2, at its start too. So the workspace also says which ends are pooled."""
    straddled: torch.Tensor
    """[E, H] float32: sum, before this step, of the granule that a row's chunk begins within."""

    def from_entry(self, entry: int) -> "PoolingWorkspace":
        """View the entries from one on."""
        return PoolingWorkspace(self.parts[entry:], self.straddled[entry:])


def pooling_workspace(
    entries: int, pool_tokens: int, pool_prefix: bool, head_dim: int, device: torch.device
) -> PoolingWorkspace:
    """Allocate a workspace: an entry a prompt row, times the layers that are pooled at once."""
    ends, slots = pool_ends(pool_prefix), pool_slots(pool_tokens)
    return PoolingWorkspace(
        torch.empty(entries, ends, slots, head_dim, device=device),
        torch.empty(entries, head_dim, device=device),
    )


def pool_rows(
    sums: torch.Tensor,
    counts: torch.Tensor,
    block_table: torch.Tensor,
    step: PromptRowBuffers,
    workspace: PoolingWorkspace,
    pooled: torch.Tensor,
    num_rows: int,
    *,
    block_size: int,
    pool_tokens: int,
) -> None:
    """Pool the routed rows in one or more layers, once their sums are updated.

    Args:
        sums: [L, G, H] bfloat16.
        counts: [G] uint8.
        block_table: [rows of the batch, M] int32.
        step: after `update_counts`.
        workspace: layer l's row p at entry l * P + p.
        pooled: [>= L * P, H] float32, out, at the same entries; written for routed rows only.
        num_rows: P.
        block_size: tokens a block, a multiple of 16.
        pool_tokens: tokens pooled at an end of a prompt.

    Host sync: none; allocates nothing.
    """
    if num_rows == 0:
        return
    head_dim = sums.shape[2]
    assert workspace.straddled.shape[0] >= sums.shape[0] * num_rows <= pooled.shape[0]
    _pool_kernel[(num_rows, sums.shape[0])](
        sums,
        counts,
        block_table,
        step.rows,
        step.straddle_counts,
        workspace.parts,
        workspace.straddled,
        pooled,
        block_table.stride(0),
        sums.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_D=power_of_two(head_dim),
        GRANULES_PER_BLOCK=block_size // GRANULE_TOKENS,
        POOL_TOKENS=pool_tokens,
        ENDS=workspace.parts.shape[1],
        SLOTS=workspace.parts.shape[2],
        num_warps=4,
    )


@triton.jit
def _pool_kernel(
    sums,
    counts,
    block_table,
    rows,
    straddle_counts,
    parts,
    straddled,
    pooled,
    stride_table,
    stride_layer,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GRANULES_PER_BLOCK: tl.constexpr,
    POOL_TOKENS: tl.constexpr,
    ENDS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0)
    layer = tl.program_id(1)
    entry = layer * tl.num_programs(0) + row
    sums += layer.to(tl.int64) * stride_layer
    if tl.load(rows + row * 8 + 4) == 0:
        return
    computed = tl.load(rows + row * 8 + 1)
    end = computed + tl.load(rows + row * 8 + 2)
    table = block_table + tl.load(rows + row * 8 + 3).to(tl.int64) * stride_table
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    total = tl.zeros([BLOCK_D], tl.float32)
    tokens = 0
    for which in tl.static_range(ENDS):
        begin, stop = pooled_range(end, which, POOL_TOKENS)
        tokens += tl.maximum(stop - tl.maximum(begin, computed), 0)
        slot = tl.arange(0, SLOTS)
        granule = begin // _GRANULE + slot
        earlier = tl.minimum(stop, computed)
        whole = (granule < computed // _GRANULE) & (granule * _GRANULE < earlier)
        physical = physical_granule(table, granule, whole, GRANULES_PER_BLOCK)
        count = tl.load(counts + physical, mask=whole, other=0).to(tl.int32)
        tokens += tl.sum(count, axis=0)
        whole &= count > 0
        source = sums + physical[:, None] * HEAD_DIM + d[None, :]
        old = tl.load(source, mask=whole[:, None] & in_head[None, :], other=0.0)
        total += tl.sum(old.to(tl.float32), axis=0)
        first = tl.maximum(tl.maximum(begin, computed), granule * _GRANULE)
        now = first < tl.minimum(stop, granule * _GRANULE + _GRANULE)
        part = ((entry * ENDS + which) * SLOTS + slot).to(tl.int64)
        source = parts + part[:, None] * HEAD_DIM + d[None, :]
        new = tl.load(source, mask=now[:, None] & in_head[None, :], other=0.0)
        total += tl.sum(new, axis=0)
        if (earlier > begin) & (earlier > computed // _GRANULE * _GRANULE):
            total += tl.load(straddled + entry * HEAD_DIM + d, mask=in_head, other=0.0)
            tokens += tl.load(straddle_counts + row)
    total = total / tl.maximum(tokens, 1).to(tl.float32)
    tl.store(pooled + entry * HEAD_DIM + d, total, mask=in_head)
