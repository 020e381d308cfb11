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

from flux_vllm.attention_backend.kernels.tiles import power_of_two
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
    num_tokens: int
    """Prompt tokens of the step."""


NO_ROWS = PackedRows(np.empty((0, COLUMNS), dtype=np.int32), 0, 0)
"""Of a step that only decodes."""


class PromptRowBuffers(NamedTuple):
    """Buffers of the step on the device, allocated once for P rows at most."""

    rows: torch.Tensor
    """[P, COLUMNS] int32: PackedRows.rows."""
    straddle_counts: torch.Tensor
    """[P] int32: tokens, before this step, of the granule that a row's chunk begins within."""


def pack_prompt_rows(spans: list[PromptSpan], routed: np.ndarray, slots: np.ndarray) -> PackedRows:
    """Pack the rows of a batch that compute prompt tokens; only those can be routed.

    Args:
        spans: all rows of the batch, in order.
        routed: [R] bool, rows to route in this step.
        slots: [R] int64, route-table slots.

    Returns: PackedRows, on the host.
    """
    packed = []
    token = program = total = 0
    for row, span in enumerate(spans):
        prompt = max(0, span.known_end - span.computed)
        if prompt:
            packed.append(
                (token, span.computed, prompt, row, int(routed[row]), int(slots[row]), program, 0)
            )
            last = (span.computed + prompt - 1) // GRANULE_TOKENS
            program += last - span.computed // GRANULE_TOKENS + 1
            total += prompt
        token += span.scheduled
    return PackedRows(np.array(packed, dtype=np.int32).reshape(-1, COLUMNS), program, total)


def pool_ends(pool_prefix: bool) -> int:
    """Return the ends of a prompt that are pooled; its latest tokens always are."""
    return 2 if pool_prefix else 1


def pool_slots(pool_tokens: int) -> int:
    """Return the granules, rounded up to a power of two, that one end of a prompt may touch."""
    return power_of_two(-(-pool_tokens // GRANULE_TOKENS) + 1)


def update_counts(
    counts: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_tokens: int,
    packed: PackedRows,
    step: PromptRowBuffers,
) -> None:
    """Count this step's prompt tokens by granule.

    To be called for every step, also those that only decode: a granule whose first slot is
    written starts anew. A granule with count 0 holds no sum, whatever its memory says.

    Args:
        counts: [G] uint8, in and out: prompt tokens in each granule's sum.
        slot_mapping: [>= T] int64: KV slot of each token, -1 for padding.
        num_tokens: T, tokens that slot_mapping covers (host).
        packed: of the step.
        step: `rows` are those of `packed`; `straddle_counts` is written.

    Host sync: none.
    """
    # Prompt tokens reset their own granules as they are counted.
    if num_tokens > packed.num_tokens:
        _reset_kernel[(-(-num_tokens // 1024),)](counts, slot_mapping, num_tokens, BLOCK=1024)
    if packed.num_programs:
        _count_kernel[(packed.num_programs,)](
            counts, slot_mapping, step.rows, step.straddle_counts, len(packed.rows), num_warps=1
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
    """Return the positions [begin, stop) pooled at the prompt's end (0) or its start (1)."""
    if WHICH == 0:
        begin = tl.maximum(end - POOL_TOKENS, 0)
        stop = end
    else:
        begin = end * 0
        stop = tl.minimum(end, POOL_TOKENS)
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
        if begin % _GRANULE != 0:
            before = tl.load(counts + slot // _GRANULE).to(tl.int32)
        tl.store(counts + slot // _GRANULE, (before + added).to(tl.uint8))
    if granule == computed // _GRANULE:
        tl.store(straddle_counts + row, before)
