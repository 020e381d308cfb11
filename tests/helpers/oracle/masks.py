"""Which keys each sparse pattern shows a chunk's queries at prefill: the definitions.

Dimension legend: Q queries of a chunk, S keys of a request, N query heads, K kv heads, H head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch

from tests.helpers.oracle import naive
from tests.helpers.oracle.block_choice import BLOCK, choose_blocks


@dataclass(frozen=True, slots=True)
class SparsePattern:
    """What SPARSE means: attended tokens, and the KV block size that decode widens to.

    Attributes:
        sink_tokens, window_tokens, block_size: of decode, and of prefill where the kind has them.
        kind: what prefill does: "streaming", "triangle" or "xattention".
        tail_tokens: of triangle: the prompt's last queries, which see everything.
        stride: of xattention's anti-diagonals.
        threshold: of xattention: share of the estimated attention that the chosen blocks hold.
        full_decode_tokens: of an answer, for which decode is as under FULL.
        sparse_prefill: whether prefill is as under SPARSE in all layers.
    """

    sink_tokens: int
    window_tokens: int
    block_size: int
    kind: str = "streaming"
    tail_tokens: int = 128
    stride: int = 16
    threshold: float = 0.9
    full_decode_tokens: int = 0
    sparse_prefill: bool = False

    @classmethod
    def of(cls, pattern: Any) -> "SparsePattern":
        """Say what a pattern of the package means at prefill."""
        names = ("sink_tokens", "window_tokens", "tail_tokens", "stride", "threshold")
        values = {name: getattr(pattern, name) for name in names if hasattr(pattern, name)}
        return cls(block_size=1, kind=pattern.name, **values)


def visible(
    pattern: Any, query: torch.Tensor, key: torch.Tensor, prompt_len: int, scale: float
) -> torch.Tensor:
    """Build the mask of a pattern of the package over one request's chunk.

    Args:
        pattern: of the package.
        query: [Q, N, H]; the last one is that of the last key.
        key: [S, K, H].
        prompt_len: tokens of the request's prompt.
        scale: of the scores.

    Returns: [Q, S] bool, or [N, Q, S] where heads differ.
    """
    rule = SparsePattern.of(pattern)
    if rule.kind == "xattention":
        return of_blocks(choices(rule, query, key, scale)[0], len(query), len(key))
    return of_positions(rule, range(len(key) - len(query), len(key)), prompt_len)


def of_positions(pattern: SparsePattern, positions: range, prompt_len: int) -> torch.Tensor:
    """Build the mask [Q, S] of a pattern by which only positions count."""
    assert pattern.kind in ("streaming", "triangle"), pattern.kind
    sizes = (pattern.sink_tokens, pattern.window_tokens)
    mask = naive.prefill_mask(positions, naive.SPARSE, *sizes)
    if pattern.kind == "triangle":
        in_tail = torch.arange(positions.start, positions.stop) >= prompt_len - pattern.tail_tokens
        mask |= naive.prefill_mask(positions, naive.FULL, *sizes) & in_tail[:, None]
    return mask


def choices(
    pattern: SparsePattern, query: torch.Tensor, key: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose XAttention's blocks for every head, from query [Q, N, H] and key [S, K, H].

    Returns: [N, query blocks, key blocks] bool, and [query blocks] the least margin of the heads'
        choices; see `choose_blocks`.
    """
    group = query.shape[1] // key.shape[1]
    q, k = query.float(), key.float()
    chosen = [
        choose_blocks(q[:, n], k[:, n // group], scale, pattern.stride, pattern.threshold)
        for n in range(query.shape[1])
    ]
    blocks, margins = zip(*chosen, strict=True)
    return torch.stack(blocks), torch.stack(margins).amin(dim=0)


def of_blocks(blocks: torch.Tensor, num_queries: int, num_keys: int) -> torch.Tensor:
    """Build the mask [N, Q, S] of chosen blocks [N, query blocks, key blocks]."""
    query, key = torch.arange(num_keys - num_queries, num_keys), torch.arange(num_keys)
    return blocks[:, query // BLOCK][:, :, key // BLOCK] & (key <= query[:, None])
