"""Which keys each sparse pattern shows a chunk's queries: the definitions, position by position.

Dimension legend: Q queries of a chunk, S keys of a request, N query heads, K kv heads, H head dim.
"""

import torch

from flux_vllm.patterns import streaming, triangle, xattention
from flux_vllm.patterns.base import SparsePattern
from tests.helpers.oracle import naive

BLOCK = 128


def visible(
    pattern: SparsePattern, query: torch.Tensor, key: torch.Tensor, prompt_len: int, scale: float
) -> torch.Tensor:
    """Build a pattern's mask over one request's chunk.

    Args:
        pattern: of the package.
        query: [Q, N, H]; the last one is that of the last key.
        key: [S, K, H].
        prompt_len: tokens of the request's prompt.
        scale: of the scores.

    Returns: [Q, S] bool, or [N, Q, S] where heads differ.
    """
    if isinstance(pattern, xattention.Pattern):
        return _of_blocks(pattern, query, key, scale)
    assert isinstance(pattern, streaming.Pattern)
    positions = range(len(key) - len(query), len(key))
    mask = naive.prefill_mask(positions, naive.SPARSE, pattern.sink_tokens, pattern.window_tokens)
    if isinstance(pattern, triangle.Pattern):
        for row, position in enumerate(positions):
            if position >= prompt_len - pattern.tail_tokens:
                mask[row, : position + 1] = True
    return mask


def _of_blocks(
    pattern: xattention.Pattern, query: torch.Tensor, key: torch.Tensor, scale: float
) -> torch.Tensor:
    """Build XAttention's mask [N, Q, S], product by product."""
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    start, end = len(key) - len(query), len(key)
    mask = torch.zeros(heads, len(query), end, dtype=torch.bool)
    for head in range(heads):
        padded = torch.zeros(-(-end // BLOCK) * BLOCK, 2, query.shape[2])
        padded[start:end, 0] = query[:, head].float()
        padded[:end, 1] = key[:, head // group].float()
        for block in range(start // BLOCK, -(-end // BLOCK)):
            kept = _kept(pattern, padded, block, start, end, scale)
            for position in range(max(start, block * BLOCK), min(end, (block + 1) * BLOCK)):
                for key_block in kept:
                    seen = slice(key_block * BLOCK, min(position, key_block * BLOCK + 127) + 1)
                    mask[head, position - start, seen] = True
    return mask


def _kept(
    pattern: xattention.Pattern,
    padded: torch.Tensor,
    block: int,
    start: int,
    end: int,
    scale: float,
) -> list[int]:
    """Choose a query block's key blocks, from queries and keys [positions, 2, H] by grid."""
    stride, mass = pattern.stride, [0.0] * (block + 1)
    rows = range(block * BLOCK // stride, (block + 1) * BLOCK // stride)
    # Strided rows that have a query in the chunk.
    present = [row for row in rows if (row + 1) * stride > start and row * stride < end]
    for row in present:
        scores = []
        for column in range(row + 1):
            queries = padded[row * stride : (row + 1) * stride, 0]
            keys = padded[column * stride : (column + 1) * stride, 1]
            scores.append((queries.flip(0) * keys).sum() * scale / stride)
        for column, weight in enumerate(torch.stack(scores).softmax(dim=0).tolist()):
            mass[column * stride // BLOCK] += weight
    kept = sorted({0, block})
    others = sorted(range(1, block), key=lambda other: -mass[other])
    while sum(mass[b] for b in kept) < pattern.threshold * len(present) and others:
        kept.append(others.pop(0))
    return kept
