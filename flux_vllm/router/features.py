"""What a router looks at: the prompt's first and latest queries before RoPE, pooled to one vector.

A prompt's queries may have been computed in this step, in an earlier chunk, or by another request
whose KV blocks the prefix cache shares. Queries of this step count exactly; earlier ones live on
as sums over granules of 16 positions of a KV block, so an edge among them rounds outward to a
granule. `docs/ROUTE_STATE.md` derives the definition.

Dimension legend: R requests to route, T prompt tokens of this step, G granules, H head dim,
M block-table width.
"""

from dataclasses import dataclass

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


def pooled_ranges(span: PromptSpan, pool_tokens: int) -> tuple[range, range]:
    """Give the positions pooled at this point: the prompt's first and its latest tokens.

    The two overlap in a prompt shorter than twice `pool_tokens`, whose tokens then count twice.
    Source: arXiv 2604.07394, `ctx_q` pooling.
    """
    end = span.known_end
    return range(min(pool_tokens, end)), range(max(0, end - pool_tokens), end)


@dataclass(frozen=True, slots=True)
class PoolingPlan:
    """How this step's and earlier queries make up each request's pooled vector; one a step."""

    step_weights: torch.Tensor
    """[R, T] float32: how often each prompt token of this step counts (0, 1 or 2)."""
    granules: torch.Tensor
    """[G] int64: logical granules, as row * granules_per_row + index, finished before this step."""
    granule_weights: torch.Tensor
    """[R, G] float32."""
    straddled: torch.Tensor
    """[R] int64: logical granule that the chunk begins within, or -1; its sum is read before
    this step adds to it."""
    straddle_weights: torch.Tensor
    """[R, 1] float32."""


def plan_pooling(
    spans: list[PromptSpan],
    token_offsets: list[int],
    num_tokens: int,
    pool_tokens: int,
    granules_per_row: int,
) -> PoolingPlan:
    """Plan the pooling of one step.

    Args:
        spans: the R requests to route.
        token_offsets: [R] index of each request's first token among the T prompt tokens.
        num_tokens: T.
        pool_tokens: tokens pooled at each end of the prompt.
        granules_per_row: M * block_size / 16, the stride of logical granule numbers.

    Returns: PoolingPlan, on the CPU.
    """
    rows = len(spans)
    step_weights = torch.zeros(rows, num_tokens)
    straddled = torch.full((rows,), -1, dtype=torch.int64)
    straddle_weights = torch.zeros(rows, 1)
    granules: list[int] = []
    weights: list[tuple[int, int]] = []  # (row, column) of each granule counted once
    for row, span in enumerate(spans):
        first = span.computed // GRANULE_TOKENS  # the first granule this step writes to
        for positions in pooled_ranges(span, pool_tokens):
            if len(positions) == 0:
                continue
            begin = max(positions.start, span.computed) - span.computed
            end = positions.stop - span.computed
            if end > begin:
                offset = token_offsets[row]
                step_weights[row, offset + begin : offset + end] += 1
            earlier_stop = min(positions.stop, span.computed)
            if earlier_stop <= positions.start:
                continue
            low = positions.start // GRANULE_TOKENS
            high = -(-earlier_stop // GRANULE_TOKENS)
            for granule in range(low, min(high, first)):
                weights.append((row, len(granules)))
                granules.append(row * granules_per_row + granule)
            if high > first:
                straddled[row] = row * granules_per_row + first
                straddle_weights[row] += 1
    granule_weights = torch.zeros(rows, len(granules))
    for row, column in weights:
        granule_weights[row, column] = 1
    return PoolingPlan(
        step_weights=step_weights,
        granules=torch.tensor(granules, dtype=torch.int64),
        granule_weights=granule_weights,
        straddled=straddled,
        straddle_weights=straddle_weights,
    )


def physical_granules(
    logical: torch.Tensor, block_table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Map logical granules to granules of the KV cache.

    Args:
        logical: [...] int64, row * (M * block_size / 16) + index; -1 stays out of range and maps
            to granule 0 of the null block.
        block_table: [R, M] int32, physical block ids.
        block_size: tokens a block, a multiple of 16.

    Returns: [...] int64, block * (block_size / 16) + index within the block.
    """
    per_block = block_size // GRANULE_TOKENS
    table = block_table.flatten().long()
    block = table[(logical // per_block).clamp(min=0)]
    return torch.where(logical < 0, 0, block * per_block + logical % per_block)
