"""XAttention: each query block attends to the key blocks that hold most of its estimated attention.

Queries and keys lie in blocks of 128 positions, counted from position 0 of the request. Attention
between a query block and the key blocks up to it is estimated from sums along anti-diagonals of
stride x stride products, and the fewest key blocks are kept whose mass reaches the threshold; the
first block (the sinks) and the query block's own are always among them. Each query head chooses for
itself, also where heads share keys. Source: arXiv 2503.16428.

A chunk that begins or ends within a block has a part of that block's queries, and they choose for
themselves; the keys are always all that the request has. Decode is sinks and window.

Dimension legend: N query heads, K kv heads, H head dim, Q query blocks, M key blocks, G strided
rows a block (128 / stride).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from flux_vllm.batch import Batch
from flux_vllm.patterns.base import SparsePattern, option_error

BLOCK = 128
"""Positions a block."""


@dataclass(frozen=True, kw_only=True)
class Pattern(SparsePattern):
    """Block-sparse prefill; `sink_tokens` and `window_tokens` are of decode alone."""

    name: ClassVar[str] = "xattention"

    threshold: float = 0.9
    """Share of the estimated attention that the kept blocks hold."""
    stride: int = 16
    """Of the anti-diagonals: smaller is more exact and costs more."""

    def __post_init__(self) -> None:
        if type(self.threshold) not in (int, float) or not 0 < self.threshold <= 1:
            raise option_error("threshold", "a number above 0 and at most 1", self.threshold)
        if self.stride not in (8, 16):
            raise option_error("stride", "8 or 16", self.stride)

    @property
    def is_local(self) -> bool:
        """A query's blocks may lie anywhere."""
        return False

    @property
    def reach(self) -> int:
        """The first block and the second."""
        return 2 * BLOCK

    def prefill_keys(self, batch: Batch) -> None:
        """Give nothing: the blocks kept depend on the data, and are known on the device alone."""
        return


def choose_blocks(
    pattern: Pattern,
    q: torch.Tensor,
    k: torch.Tensor,
    first: int,
    present: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Choose the key blocks of query blocks, in torch.

    Args:
        pattern: stride and threshold.
        q: [..., N, Q * 128, H]: whole blocks, zeros where there is no query.
        k: [..., K, M * 128, H]: whole blocks from position 0 to the last query's, zeros past it.
        first: number of the first query block; the last one's is M - 1.
        present: [..., Q * G] bool: strided rows that have a query; the others do not count.
        scale: of the scores.

    Returns: [..., N, Q, M] bool.
    """
    stride, rows = pattern.stride, BLOCK // pattern.stride
    strided_q = q.float().unflatten(-2, (-1, stride)).flip(-2).flatten(-2)
    strided_k = k.float().unflatten(-2, (-1, stride)).flatten(-2)
    kv_heads, columns = strided_k.shape[-3:-1]
    grouped = strided_q.unflatten(-3, (kv_heads, -1)).flatten(-3, -2)
    scores = (grouped @ strided_k.transpose(-1, -2)) * (scale / stride)
    scores = scores.unflatten(-2, (-1, strided_q.shape[-2])).flatten(-4, -3)

    row = torch.arange(first * rows, first * rows + strided_q.shape[-2], device=q.device)
    later = torch.arange(columns, device=q.device) > row[:, None]
    weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
    mass = (weights * present[..., None, :, None]).unflatten(-1, (-1, rows)).sum(dim=-1)
    mass = mass.unflatten(-2, (-1, rows)).sum(dim=-2)
    counted = present.unflatten(-1, (-1, rows)).sum(dim=-1)[..., None, :, None]

    column = torch.arange(columns // rows, device=q.device)
    block = torch.arange(first, first + mass.shape[-2], device=q.device)[:, None]
    forced = (column == 0) | (column == block)
    needed = pattern.threshold * counted - (mass * forced).sum(dim=-1, keepdim=True)
    others, order = mass.masked_fill(forced, 0).sort(dim=-1, descending=True)
    # One is needed as long as those before it do not suffice.
    wanted = others.cumsum(dim=-1) - others < needed
    return (forced | torch.zeros_like(wanted).scatter(-1, order, wanted)) & (column <= block)
