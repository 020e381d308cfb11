"""Attention by the set definitions of DESIGN.md section 2, in float32: the reference's own.

Dimension legend: N query heads, K key-value heads, H head dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .reference_router import FULL, SPARSE

Phase = Literal["prefill", "decode"]
_BLOCK = 128  # of XAttention, for queries and keys
_QUERY_SLICE = 256  # queries per product: bounds the score matrix at 3,500 tokens


@dataclass(frozen=True, slots=True)
class SparsePattern:
    """What SPARSE means: attended tokens, and the KV block size that decode widens to.

    Attributes:
        sink_tokens, window_tokens, block_size: of decode, and of prefill where the kind has them.
        kind: what prefill does: "streaming", "triangle" or "xattention".
        tail_tokens: of triangle: the prompt's last queries, which see everything.
        stride: of xattention's anti-diagonals.
        threshold: of xattention: share of the estimated attention that the chosen blocks hold.
    """

    sink_tokens: int
    window_tokens: int
    block_size: int
    kind: str = "streaming"
    tail_tokens: int = 128
    stride: int = 16
    threshold: float = 0.9


def visible_keys(
    start: int,
    end: int,
    route: int,
    phase: Phase,
    pattern: SparsePattern,
    prompt_len: int | None = None,
) -> torch.Tensor:
    """Say which keys [0, end) the queries [start, end) see. Returns: [end - start, end] bool.

    The queries of a decode row (a token and its drafts) share the window of the first one.
    """
    key = torch.arange(end)[None, :]
    query = torch.arange(start, end)[:, None]
    causal = key <= query
    if route == FULL:
        return causal
    sink_end = pattern.sink_tokens
    window_start = query - pattern.window_tokens + 1
    if phase == "decode":
        sink_end = -(-sink_end // pattern.block_size) * pattern.block_size
        first = max(0, start - pattern.window_tokens + 1)
        window_start = first // pattern.block_size * pattern.block_size
    seen = (key < sink_end) | (key >= window_start)
    if phase == "prefill" and pattern.kind == "triangle":
        assert prompt_len is not None, "triangle: the prompt's last queries are asked for"
        seen |= query >= prompt_len - pattern.tail_tokens
    return causal & seen


def chosen_blocks(
    query: torch.Tensor, key: torch.Tensor, scaling: float, pattern: SparsePattern
) -> torch.Tensor:
    """Choose XAttention's key blocks of 128 for one head; see `choose_blocks`."""
    return choose_blocks(query, key, scaling, pattern)[0]


def choose_blocks(
    query: torch.Tensor, key: torch.Tensor, scaling: float, pattern: SparsePattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose XAttention's key blocks of 128 for one head, by the text of arXiv 2503.16428.

    Every block of stride x stride query-key products is summed along its anti-diagonal, the sums
    are scaled by 1 / stride and softmaxed over each row of earlier blocks, and a query block takes
    the fewest key blocks that hold `threshold` of its rows' mass: the first and its own for sure.

    Args:
        query: [q, H] float32, the last q positions; earlier queries count as zeros.
        key: [n, H] float32, all positions.
        scaling: factor on the scores.
        pattern: of kind "xattention".
    Returns: [all query blocks, key blocks] bool, False for query blocks before the chunk's; and
        [all query blocks] the choice's margin, infinite where there was none to make.
    """
    end, stride = len(key), pattern.stride
    blocks = -(-end // _BLOCK)
    rows, per_block = blocks * _BLOCK // stride, _BLOCK // stride
    products = torch.zeros(blocks * _BLOCK, blocks * _BLOCK)
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
    for block in range((end - len(query)) // _BLOCK, blocks):
        order = sorted(set(range(1, block)), key=lambda b: -mass[block, b].item())
        taken = sorted({0, block})
        while mass[block, taken].sum() < pattern.threshold * mass[block].sum() and order:
            taken.append(order.pop(0))
        chosen[block, taken] = True
        margin[block] = choice_margin(
            mass[block, : block + 1].tolist(), taken, order, pattern.threshold
        )
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


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    route: int,
    phase: Phase,
    pattern: SparsePattern,
    prompt_len: int | None = None,
    margins: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with the last tokens of a sequence to all of it, under one route's mask.

    Args:
        query: [N, q, H] float32, the last q positions.
        key: [K, n, H] float32, all positions.
        value: [K, n, H] float32.
        scaling: factor on the scores.
        route: FULL or SPARSE.
        phase: "prefill" or "decode".
        pattern: what SPARSE means.
        prompt_len: tokens of the prompt, for the kinds that ask for it.
        margins: [q], lowered to the margins of the queries' block choices; see `choose_blocks`.
    Returns: [q, N, H] float32.
    """
    heads, length, head_dim = query.shape
    kv_heads, seq_len, _ = key.shape
    grouped = query.view(kv_heads, heads // kv_heads, length, head_dim)
    output = torch.empty(length, heads, head_dim)
    by_blocks = None
    if (route, phase, pattern.kind) == (SPARSE, "prefill", "xattention"):
        group = heads // kv_heads
        choices = [choose_blocks(query[n], key[n // group], scaling, pattern) for n in range(heads)]
        by_blocks = torch.stack([chosen for chosen, _ in choices])
        if margins is not None:
            closest = torch.stack([margin for _, margin in choices]).amin(dim=0)
            closest = closest[torch.arange(seq_len - length, seq_len) // _BLOCK]
            margins.copy_(margins.minimum(closest))
    # The window of a decode row is its first query's, so the row is not cut.
    slice_length = _QUERY_SLICE if phase == "prefill" else length
    for low in range(0, length, slice_length):
        high = min(low + slice_length, length)
        start, end = seq_len - length + low, seq_len - length + high
        # Query heads of one key-value head are stacked as rows: keys are never expanded.
        rows = grouped[:, :, low:high].reshape(kv_heads, -1, head_dim)
        scores = rows @ key[:, :end].transpose(1, 2) * scaling
        if by_blocks is None:
            hidden = ~visible_keys(start, end, route, phase, pattern, prompt_len)
        else:
            queries, keys = torch.arange(start, end), torch.arange(end)
            seen = by_blocks[:, queries // _BLOCK][:, :, keys // _BLOCK]
            seen &= keys <= queries[:, None]
            hidden = ~seen.view(kv_heads, -1, high - low, end)
        scores.view(kv_heads, -1, high - low, end).masked_fill_(hidden, float("-inf"))
        mixed = torch.softmax(scores, dim=-1) @ value[:, :end]
        output[low:high] = mixed.view(heads, high - low, head_dim).transpose(0, 1)
    return output
