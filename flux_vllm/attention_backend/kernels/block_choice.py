"""Choose a query block's key blocks: the fewest that hold a share of its estimated attention.

The block of the sinks and the query block's own are always among them, and their mass counts. The
others follow by mass; a search over the bits of a float finds the smallest mass that is still
needed, so nothing is sorted. Source: arXiv 2503.16428, section 2.2.

Dimension legend: N query heads, Q tasks, E entries, G strided rows a block, R rows of the batch.
"""

import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend.kernels.tiles import NO_SCORE, power_of_two

LEAST_WIDTH = 1024
"""Key blocks, 131,072 tokens: shorter contexts share one compiled kernel."""


def choose_blocks(
    lse: torch.Tensor,
    tasks: torch.Tensor,
    seqused_q: torch.Tensor,
    seqused_k: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    *,
    most_blocks: int,
    threshold: float,
    stride: int,
) -> None:
    """Choose by head.

    Args:
        lse: [N, E * G] float32, of `score_blocks`.
        tasks: [Q, 3] int32, see BlockTasks.
        seqused_q: [R] int32 on the device: all of the row's queries, or 0 to skip it.
        seqused_k: [R] int32: keys, this step's queries included.
        chosen: [N, E] int32, out: of task t from its first entry on, its key blocks, ascending.
        counts: [N, Q] int32, out: how many they are; unspecified for skipped rows.
        most_blocks: key blocks of the longest row (host).
        threshold: share of the mass to hold, above 0; equal masses at the cut are all taken.
        stride: of the anti-diagonals.

    Host sync: none; allocates nothing.
    """
    rows = (lse.shape[1] // chosen.shape[1]) if chosen.shape[1] else 0
    width = max(LEAST_WIDTH, power_of_two(most_blocks))
    _choice_kernel[(len(tasks), len(lse))](
        lse,
        tasks,
        seqused_q,
        seqused_k,
        chosen,
        counts,
        threshold,
        lse.stride(0),
        chosen.stride(0),
        counts.stride(0),
        STRIDE=stride,
        ROWS=rows,
        WIDTH=width,
        num_warps=4 if width <= 2048 else 8,
    )


@triton.jit(do_not_specialize=["stride_lse", "stride_chosen", "stride_counts"])
def _choice_kernel(
    lse,
    tasks,
    seqused_q,
    seqused_k,
    chosen,
    counts,
    threshold,
    stride_lse,
    stride_chosen,
    stride_counts,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    task = tl.program_id(0)
    row = tl.load(tasks + task * 3)
    if row < 0:
        return
    queries = tl.load(seqused_q + row)
    if queries == 0:
        return
    block = tl.load(tasks + task * 3 + 1)
    entry = tl.load(tasks + task * 3 + 2)
    keys = tl.load(seqused_k + row)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mass = tl.zeros([WIDTH], tl.float32)
    total = 0.0
    for i in range(ROWS):
        position = (block * ROWS + i) * STRIDE
        present = (position + STRIDE > keys - queries) & (position < keys)
        source = lse + head * stride_lse + entry * ROWS + i * (block + 1)
        last = tl.where(present, block, -1)
        scores = tl.load(source + column, mask=column <= last, other=NO_SCORE)
        weights = tl.math.exp2(scores - tl.max(scores, axis=0))
        mass += tl.where(present, weights / tl.sum(weights, axis=0), 0.0)
        total += present.to(tl.float32)

    kept = (column == 0) | (column == block)
    needed = threshold * total - tl.sum(tl.where(kept, mass, 0.0), axis=0)
    others = ~kept & (column <= block)
    bits = tl.where(others, mass.to(tl.int32, bitcast=True), -1)
    # The bits of positive floats are in the floats' order.
    low = 0
    high = 0x7F800000
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(bits >= middle, mass, 0.0), axis=0) >= needed
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    kept |= bits >= low
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(chosen + head * stride_chosen + entry + place, column, mask=kept)
    tl.store(counts + head * stride_counts + task, tl.sum(kept.to(tl.int32), axis=0))
