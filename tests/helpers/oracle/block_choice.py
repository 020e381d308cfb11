"""XAttention's choice of key blocks for one head, and how close it was."""

import math
from collections.abc import Sequence

import torch

BLOCK = 128
"""Tokens of a query block and of a key block."""


def choose_blocks(
    query: torch.Tensor, key: torch.Tensor, scaling: float, stride: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose XAttention's key blocks of 128 for one head, by the text of arXiv 2503.16428.

    Every block of stride x stride query-key products is summed along its anti-diagonal, the sums
    are scaled by 1 / stride and softmaxed over each row of earlier blocks, and a query block takes
    the fewest key blocks that hold `threshold` of its rows' mass: the first and its own for sure.

    Args:
        query: [q, H] float32, the last q positions; earlier queries count as zeros.
        key: [n, H] float32, all positions.
        scaling: factor on the scores.
        stride: of the anti-diagonals.
        threshold: share of the estimated attention that the chosen blocks hold.
    Returns: [all query blocks, key blocks] bool, False for query blocks before the chunk's; and
        [all query blocks] the choice's margin, infinite where there was none to make.
    """
    end = len(key)
    blocks = -(-end // BLOCK)
    rows, per_block = blocks * BLOCK // stride, BLOCK // stride
    products = torch.zeros(blocks * BLOCK, blocks * BLOCK)
    products[end - len(query) : end, :end] = query @ key.T
    cells = products.view(rows, stride, rows, stride)
    sums = torch.stack([cells[:, stride - 1 - i, :, i] for i in range(stride)]).sum(dim=0)
    later = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    mass = (sums.double() * scaling / stride).masked_fill(later, float("-inf")).softmax(dim=-1)
    row_end = stride * torch.arange(1, rows + 1)
    mass[(row_end <= end - len(query)) | (row_end - stride >= end)] = 0
    mass = mass.view(blocks, per_block, blocks, per_block).sum(dim=(1, 3))
    chosen = torch.zeros(blocks, blocks, dtype=torch.bool)
    margin = torch.full((blocks,), float("inf"))
    for block in range((end - len(query)) // BLOCK, blocks):
        order = sorted(set(range(1, block)), key=lambda b: -mass[block, b].item())
        taken = sorted({0, block})
        while mass[block, taken].sum() < threshold * mass[block].sum() and order:
            taken.append(order.pop(0))
        chosen[block, taken] = True
        margin[block] = choice_margin(mass[block, : block + 1].tolist(), taken, order, threshold)
    return chosen, margin


def choice_margin(
    mass: Sequence[float], taken: Sequence[int], left: Sequence[int], share: float
) -> float:
    """Say by what factor estimates would have to be off for another choice, as a logarithm.

    Args:
        mass: of each block.
        taken: the blocks taken, the first one and the query's own before those taken by mass.
        left: the others, by mass.
        share: of the mass, to be held by those taken; with all of it, nothing else can be chosen.
    """
    if share == 1:
        return float("inf")
    may_be_left = (1 - share) * sum(mass)
    rest, logs = sum(mass[b] for b in left), [float("inf")]
    if rest > 0:
        logs.append(math.log(may_be_left / rest))
    if taken[-1] not in (0, len(mass) - 1):
        last = mass[taken[-1]]
        logs.append(math.log((rest + last) / may_be_left))
        if rest > 0:
            logs.append(math.log(last / mass[left[0]]))
    return min(logs)
