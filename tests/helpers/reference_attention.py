"""Attention by the set definitions of DESIGN.md section 2, in float32: the reference's own.

Dimension legend: N query heads, K key-value heads, H head dim.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from .reference_router import FULL

Phase = Literal["prefill", "decode"]
_QUERY_SLICE = 256  # queries per product: bounds the score matrix at 3,500 tokens


@dataclass(frozen=True, slots=True)
class SparsePattern:
    """What SPARSE means: attended tokens, and the KV block size that decode widens to."""

    sink_tokens: int
    window_tokens: int
    block_size: int


def visible_keys(
    start: int, end: int, route: int, phase: Phase, pattern: SparsePattern
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
    return causal & ((key < sink_end) | (key >= window_start))


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    route: int,
    phase: Phase,
    pattern: SparsePattern,
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
    Returns: [q, N, H] float32.
    """
    heads, length, head_dim = query.shape
    kv_heads, seq_len, _ = key.shape
    grouped = query.view(kv_heads, heads // kv_heads, length, head_dim)
    output = torch.empty(length, heads, head_dim)
    # The window of a decode row is its first query's, so the row is not cut.
    slice_length = _QUERY_SLICE if phase == "prefill" else length
    for low in range(0, length, slice_length):
        high = min(low + slice_length, length)
        start, end = seq_len - length + low, seq_len - length + high
        # Query heads of one key-value head are stacked as rows: keys are never expanded.
        rows = grouped[:, :, low:high].reshape(kv_heads, -1, head_dim)
        scores = rows @ key[:, :end].transpose(1, 2) * scaling
        hidden = ~visible_keys(start, end, route, phase, pattern)
        scores.view(kv_heads, -1, high - low, end).masked_fill_(hidden, float("-inf"))
        mixed = torch.softmax(scores, dim=-1) @ value[:, :end]
        output[low:high] = mixed.view(heads, high - low, head_dim).transpose(0, 1)
    return output
