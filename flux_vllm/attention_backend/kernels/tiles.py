"""Pieces that the attention kernels share: tile products, rows of a packed batch, softmax."""

import functools

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this was imported)."""

MOST_QUERY_HEADS = 64
"""Query heads of one KV head that the smallest tile of queries holds."""
LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
NO_SCORE = tl.constexpr(-1.0e30)
"""Running maximum before any score: finite, so that an all-masked tile gives no NaN."""


@functools.cache
def is_hopper() -> bool:
    """Tell whether there is a GPU of compute capability 9; torch's own takes the host longer."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def power_of_two(number: int) -> int:
    """Round a positive number up to a power of two; Triton's own takes the host 4 us."""
    return 1 << (number - 1).bit_length()


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """Multiply tiles, accumulating in float32; float32 operands multiply in float32, not TF32."""
    if INTERPRET:
        # The interpreter keeps bfloat16 as its bits and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def find_row(query_start_loc, tile, num_rows, BLOCK_Q: tl.constexpr):
    """Find the row of a tile, where row r's tiles begin at query_start_loc[r] // BLOCK_Q + r.

    Returns the row and the tile's number within it; a row may own a tile more than it needs. Tiles
    before the first row, whose queries need not be the batch's first, have negative numbers in it.
    """
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        begin = tl.load(query_start_loc + middle) // BLOCK_Q + middle
        if begin <= tile:
            low = middle + 1
        else:
            high = middle
    row = tl.maximum(low - 1, 0)
    return row, tile - tl.load(query_start_loc + row) // BLOCK_Q - row


@triton.jit
def begin_softmax(sink_logits, head, is_first, BLOCK_M: tl.constexpr):
    """Return the running maximum (base 2) and sum of a softmax over no key yet.

    A learned sink is a score without a value. Where heads have them (not None), those of `head`
    [BLOCK_M] begin the softmax; of a row's shares the first one's alone, so that it counts once.
    """
    largest = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sink_logits is not None:
        logit = tl.load(sink_logits + head).to(tl.float32) * _LOG2_E
        if is_first:
            largest = tl.maximum(logit, largest)
            total += 1.0
    return largest, total


@triton.jit
def softmax_step(scores, largest, total, acc):
    """Take a tile of base-2 scores into the running softmax; returns the tile's weights too."""
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.math.exp2(scores - new_largest[:, None])
    decay = tl.math.exp2(largest - new_largest)
    total = total * decay + tl.sum(weights, axis=1)
    return weights, new_largest, total, acc * decay[:, None]
