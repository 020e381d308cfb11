"""Prompt rows: what the pooling kernels know of the requests that compute prompt tokens.

Packed once a step on the host, uploaded once, read by every layer. Token counts by granule belong
to the step too: they are updated here, before the first layer.

Dimension legend: P prompt rows, T tokens of the step, M block-table width, G granules of the KV
cache.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from flux_vllm.router.features import GRANULE_TOKENS, PromptSpan

COLUMNS = 8
"""Width of a packed row: token, computed, prompt tokens, table row, routed, slot, first program,
and a counter of programs, 0 between launches."""

_GRANULE = tl.constexpr(GRANULE_TOKENS)


class PackedRows(NamedTuple):
    """The prompt rows of a step."""

    rows: np.ndarray
    """[P, COLUMNS] int32, for the device."""
    num_programs: int
    """Granules that the step writes to, over all rows."""


class PooledStep(NamedTuple):
    """Buffers of the step on the device, allocated once for P rows at most."""

    rows: torch.Tensor
    """[P, COLUMNS] int32: PackedRows.rows."""
    straddle_counts: torch.Tensor
    """[P] int32: tokens, before this step, of the granule that a row's chunk begins within."""
    pooled_tokens: torch.Tensor
    """[P] float32: tokens that make up each routed row's pooled vector, at least 1."""


def pack_prompt_rows(spans: list[PromptSpan], routed: np.ndarray, slots: np.ndarray) -> PackedRows:
    """Pack the rows of a batch that compute prompt tokens; only those can be routed.

    Args:
        spans: all rows of the batch, in order.
        routed: [R] bool, rows to route in this step.
        slots: [R] int64, route-table slots.

    Returns: PackedRows, on the host.
    """
    packed = []
    token = program = 0
    for row, span in enumerate(spans):
        prompt = max(0, span.known_end - span.computed)
        if prompt:
            packed.append(
                (token, span.computed, prompt, row, int(routed[row]), int(slots[row]), program, 0)
            )
            last = (span.computed + prompt - 1) // GRANULE_TOKENS
            program += last - span.computed // GRANULE_TOKENS + 1
        token += span.scheduled
    return PackedRows(np.array(packed, dtype=np.int32).reshape(-1, COLUMNS), program)


def pool_slots(pool_tokens: int) -> int:
    """Return the granules, rounded up to a power of two, that one end of a prompt may touch."""
    return triton.next_power_of_2(triton.cdiv(pool_tokens, GRANULE_TOKENS) + 1)


def update_counts(
    counts: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_tokens: int,
    block_table: torch.Tensor,
    step: PooledStep,
    num_rows: int,
    num_programs: int,
    *,
    block_size: int,
    pool_tokens: int,
) -> None:
    """Count this step's prompt tokens by granule, and each routed row's pooled tokens.

    To be called for every step, also those that only decode: a granule whose first slot is
    written starts anew. A granule with count 0 holds no sum, whatever its memory says.

    Args:
        counts: [G] uint8, in and out: prompt tokens in each granule's sum.
        slot_mapping: [>= T] int64: KV slot of each token, -1 for padding.
        num_tokens: T, tokens that slot_mapping covers (host).
        block_table: [rows of the batch, M] int32.
        step: `rows` is read, the others are written.
        num_rows: P.
        num_programs: of PackedRows.
        block_size: tokens a block, a multiple of 16.
        pool_tokens: tokens pooled at each end of a prompt.

    Host sync: none.
    """
    if num_tokens:
        _reset_kernel[(triton.cdiv(num_tokens, 1024),)](
            counts, slot_mapping, num_tokens, BLOCK=1024
        )
    if num_rows == 0:
        return
    _count_kernel[(num_programs,)](
        counts, slot_mapping, step.rows, step.straddle_counts, num_rows, num_warps=1
    )
    _pooled_tokens_kernel[(num_rows,)](
        counts,
        block_table,
        step.rows,
        step.straddle_counts,
        step.pooled_tokens,
        block_table.stride(0),
        GRANULES_PER_BLOCK=block_size // GRANULE_TOKENS,
        POOL_TOKENS=pool_tokens,
        SLOTS=pool_slots(pool_tokens),
        num_warps=1,
    )


@triton.jit
def find_granule(rows, program, num_rows):
    """Find the prompt row and logical granule of a program; rows begin at their first program."""
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(rows + middle * 8 + 6) <= program:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    granule = tl.load(rows + row * 8 + 1) // _GRANULE + program - tl.load(rows + row * 8 + 6)
    return row, granule


@triton.jit
def pooled_range(end, WHICH: tl.constexpr, POOL_TOKENS: tl.constexpr):
    """Return the positions [begin, stop) pooled at the prompt's start (0) or its end (1)."""
    if WHICH == 0:
        begin = end * 0
        stop = tl.minimum(end, POOL_TOKENS)
    else:
        begin = tl.maximum(end - POOL_TOKENS, 0)
        stop = end
    return begin, stop


@triton.jit
def physical_granule(table, granule, mask, GRANULES_PER_BLOCK: tl.constexpr):
    """Map logical granules of one row to granules of the KV cache (int64)."""
    block = tl.load(table + granule // GRANULES_PER_BLOCK, mask=mask, other=0)
    return block.to(tl.int64) * GRANULES_PER_BLOCK + granule % GRANULES_PER_BLOCK


@triton.jit(do_not_specialize=["num_tokens"])
def _reset_kernel(counts, slot_mapping, num_tokens, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    first = (slot >= 0) & (slot % _GRANULE == 0)
    tl.store(counts + slot // _GRANULE, tl.zeros([BLOCK], tl.uint8), mask=first)


@triton.jit(do_not_specialize=["num_rows"])
def _count_kernel(counts, slot_mapping, rows, straddle_counts, num_rows):
    row, granule = find_granule(rows, tl.program_id(0), num_rows)
    computed = tl.load(rows + row * 8 + 1)
    end = computed + tl.load(rows + row * 8 + 2)
    begin = tl.maximum(granule * _GRANULE, computed)
    added = tl.minimum(granule * _GRANULE + _GRANULE, end) - begin
    slot = tl.load(slot_mapping + tl.load(rows + row * 8) + begin - computed)
    before = 0
    if slot >= 0:
        before = tl.load(counts + slot // _GRANULE).to(tl.int32)
        tl.store(counts + slot // _GRANULE, (before + added).to(tl.uint8))
    if granule == computed // _GRANULE:
        tl.store(straddle_counts + row, before)


@triton.jit
def _pooled_tokens_kernel(
    counts,
    block_table,
    rows,
    straddle_counts,
    pooled_tokens,
    stride_table,
    GRANULES_PER_BLOCK: tl.constexpr,
    POOL_TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(rows + row * 8 + 4) == 0:
        return
    computed = tl.load(rows + row * 8 + 1)
    end = computed + tl.load(rows + row * 8 + 2)
    table = block_table + tl.load(rows + row * 8 + 3).to(tl.int64) * stride_table
    tokens = 0
    for which in tl.static_range(2):
        begin, stop = pooled_range(end, which, POOL_TOKENS)
        tokens += tl.maximum(stop - tl.maximum(begin, computed), 0)
        earlier = tl.minimum(stop, computed)
        granule = begin // _GRANULE + tl.arange(0, SLOTS)
        whole = (granule < computed // _GRANULE) & (granule * _GRANULE < earlier)
        physical = physical_granule(table, granule, whole, GRANULES_PER_BLOCK)
        tokens += tl.sum(tl.load(counts + physical, mask=whole, other=0).to(tl.int32), axis=0)
        if (earlier > begin) & (earlier > computed // _GRANULE * _GRANULE):
            tokens += tl.load(straddle_counts + row)
    tl.store(pooled_tokens + row, tl.maximum(tokens, 1).to(tl.float32))
