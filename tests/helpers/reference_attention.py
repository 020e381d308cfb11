"""One layer's attention in a step of the reference: the oracle's masks, in slices of queries.

Dimension legend: N query heads, K key-value heads, H head dim.
"""

from typing import Literal

import torch

from tests.helpers.oracle import masks, naive
from tests.helpers.oracle.block_choice import BLOCK
from tests.helpers.oracle.masks import SparsePattern
from tests.helpers.reference_router import FULL, SPARSE

Phase = Literal["prefill", "decode"]
_QUERY_SLICE = 256  # queries per product: bounds the score matrix at 3,500 tokens


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
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    length, end = len(q), len(k)
    if (route, phase) == (SPARSE, "decode"):
        # The window of a decode row is its first query's, so the row is not cut.
        sizes = (pattern.sink_tokens, pattern.window_tokens, pattern.block_size)
        mask = naive.decode_mask(range(end - length, end), route, *sizes)
        return naive.attend(q, k, v, mask, scaling)
    blocks = None
    if (route, pattern.kind) == (SPARSE, "xattention"):
        blocks, closest = masks.choices(pattern, q, k, scaling)
        if margins is not None:
            closest = closest[torch.arange(end - length, end) // BLOCK]
            margins.copy_(margins.minimum(closest))
    output = torch.empty(length, len(query), query.shape[2])
    for low in range(0, length, _QUERY_SLICE):
        high = min(low + _QUERY_SLICE, length)
        positions = range(end - length + low, end - length + high)
        if blocks is not None:
            mask = masks.of_blocks(blocks, len(positions), positions.stop)
        elif route == FULL:
            mask = naive.prefill_mask(positions, FULL, 0, 0)
        else:
            assert prompt_len is not None or pattern.kind == "streaming", "expected prompt_len"
            mask = masks.of_positions(pattern, positions, prompt_len or 0)
        seen = slice(0, positions.stop)
        output[low:high] = naive.attend(q[low:high], k[seen], v[seen], mask, scaling)
    return output
