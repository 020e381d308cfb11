"""What a router looks at: the prompt's latest queries before RoPE, pooled to one vector.

Most routers look at its first ones too; the metadata field `pool_prefix` says so.

A prompt's queries may have been computed in this step, in an earlier chunk, or by another request
whose KV blocks the prefix cache shares. Queries of this step count exactly; earlier ones live on
as sums over granules of 16 positions of a KV block, so an edge among them rounds outward to a
granule. `docs/ROUTE_STATE.md` derives the definition.

Dimension legend: R requests to route, A vectors added up, M block-table width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

GRANULE_TOKENS = 16
"""Positions of a KV block that share one query sum."""


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Where one request stands in its prompt in this step."""

    computed: int
    """Tokens computed before this step: the position of the first token of the chunk."""
    scheduled: int
    """Tokens of this step."""
    prompt_len: int

    @property
    def known_end(self) -> int:
        """Prompt tokens computed once this step is done."""
        return min(self.computed + self.scheduled, self.prompt_len)


def pooled_ranges(
    span: PromptSpan, pool_tokens: int, pool_prefix: bool = True
) -> tuple[range, ...]:
    """Give the positions pooled at this point: the prompt's first tokens, if any, and its latest.

    The two overlap in a prompt shorter than twice `pool_tokens`, whose tokens then count twice.
    Source: arXiv 2604.07394, `ctx_q` pooling.
    """
    end = span.known_end
    latest = range(max(0, end - pool_tokens), end)
    return (range(min(pool_tokens, end)), latest) if pool_prefix else (latest,)


class Picks(NamedTuple):
    """Which vectors are added to which rows. A row adds up its own and touches no others: what one
    request's queries hold, NaN included, stays with that request."""

    rows: torch.Tensor
    """[A] int64, ascending: a row for each vector it counts, twice for one that counts twice."""
    items: torch.Tensor
    """[A] int64: the vector's index in its source."""

    @classmethod
    def of(cls, pairs: list[tuple[int, range]]) -> "Picks":
        """Make it of (row, items) pairs."""
        rows = [torch.full((len(items),), row) for row, items in pairs]
        parts = [torch.arange(items.start, items.stop) for _, items in pairs]
        nothing = torch.empty(0, dtype=torch.int64)
        return cls(torch.cat([nothing, *rows]), torch.cat([nothing, *parts]))

    def add_to(self, sums: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Add what is picked of `source` [items, ...] to `sums` [R, ...], in place."""
        return sums.index_add_(0, self.rows, source.to(sums.dtype))


@dataclass(frozen=True, slots=True)
class PoolingPlan:
    """How this step's and earlier queries make up each request's pooled vector; one a step."""

    tokens: Picks
    """Prompt tokens of this step."""
    granules: Picks
    """Logical granules, as row * granules_per_row + index, finished before this step."""
    straddled: Picks
    """Logical granules that a row's chunk begins within; their sums are read before this step adds
    to them."""


def plan_pooling(
    spans: list[PromptSpan],
    token_offsets: list[int],
    pool_tokens: int,
    granules_per_row: int,
    pool_prefix: bool = True,
) -> PoolingPlan:
    """Plan the pooling of one step.

    Args:
        spans: the R requests to route.
        token_offsets: [R] index of each request's first token among the prompt tokens.
        pool_tokens: tokens pooled at an end of the prompt.
        granules_per_row: M * block_size / 16, the stride of logical granule numbers.
        pool_prefix: whether the prompt's first tokens are pooled too.

    Returns: PoolingPlan, on the CPU.
    """
    tokens: list[tuple[int, range]] = []
    granules: list[tuple[int, range]] = []
    straddled: list[tuple[int, range]] = []
    for row, span in enumerate(spans):
        first = span.computed // GRANULE_TOKENS  # the first granule this step writes to
        base = row * granules_per_row
        for positions in pooled_ranges(span, pool_tokens, pool_prefix):
            # Where this row's tokens lie, less the position of the first of them.
            shift = token_offsets[row] - span.computed
            begin = max(positions.start, span.computed)
            tokens.append((row, range(begin + shift, max(begin, positions.stop) + shift)))
            earlier_stop = min(positions.stop, span.computed)
            if earlier_stop <= positions.start:
                continue
            low = positions.start // GRANULE_TOKENS
            high = -(-earlier_stop // GRANULE_TOKENS)
            granules.append((row, range(base + low, base + max(low, min(high, first)))))
            if high > first:
                straddled.append((row, range(base + first, base + first + 1)))
    return PoolingPlan(Picks.of(tokens), Picks.of(granules), Picks.of(straddled))


def physical_granules(
    logical: torch.Tensor, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Map logical granules to granules of the KV cache.

    Args:
        logical: [...] int64, row * (M * block_size / 16) + index.
        block_table: [R, M] int32, physical block ids.
        block_size: tokens a block, a multiple of 16.

    Returns: [...] int64, block * (block_size / 16) + index within the block.
    """
    per_block = block_size // GRANULE_TOKENS
    block = block_table.flatten().long()[logical // per_block]
    return block * per_block + logical % per_block
