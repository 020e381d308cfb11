"""Chunks of a prompt in training, and what the router sees at the end of each.

The server decides anew at every prefill chunk, from the prompt's latest tokens and maybe its first,
and keeps sums of earlier chunks by granules of 16 positions. This is that rule for a whole padded
batch: a chunk's tokens are attended under the chunk's own routes.

Dimension legend: B prompts, C chunks, T padded tokens, H head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from flux_vllm.router.features import GRANULE_TOKENS, PromptSpan, pooled_ranges


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How a batch is cut into chunks."""

    pool_weights: torch.Tensor
    """[B, C, T] float32: share of each token in the chunk's pooled vector; rows sum to 1."""
    chunk_of_token: torch.Tensor
    """[B, T] int64: the chunk whose routes a token is attended under; answers take the last."""
    is_last: torch.Tensor
    """[B, C] bool: the chunk that completes the prompt."""
    is_early: torch.Tensor
    """[B, C] bool: a chunk before that; neither means padding."""
    is_tail: torch.Tensor
    """[B, T] bool: the prompt's last queries, which attend to everything under both routes."""

    def to(self, device: torch.device) -> "ChunkPlan":
        """Copy to a device."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return ChunkPlan(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def pooled_segments(span: PromptSpan, pool_tokens: int, pool_prefix: bool = True) -> list[range]:
    """List the position ranges pooled for one chunk; a position in two of them counts twice.

    Positions of the chunk itself are exact; among earlier ones an edge rounds outward to a
    granule, as `flux_vllm.router.features.plan_pooling` does on the server.
    """
    segments = []
    for positions in pooled_ranges(span, pool_tokens, pool_prefix):
        start, stop = positions.start, positions.stop
        if start < span.computed:
            start -= start % GRANULE_TOKENS
            if stop <= span.computed:
                stop = min(-(-stop // GRANULE_TOKENS) * GRANULE_TOKENS, span.computed)
        segments.append(range(start, stop))
    return segments


def plan_chunks(
    chunk_ends: Sequence[Sequence[int]],
    padded_tokens: int,
    pool_tokens: int,
    pool_prefix: bool = True,
    tail_tokens: int = 0,
) -> ChunkPlan:
    """Plan the chunks of a batch.

    Args:
        chunk_ends: for each prompt, where its chunks end; the last is the prompt's length.
        padded_tokens: T.
        pool_tokens: prompt tokens pooled at an end.
        pool_prefix: whether the prompt's first tokens are pooled too.
        tail_tokens: queries at a prompt's end that SPARSE shows everything.

    Returns: ChunkPlan, on the CPU.
    """
    rows, columns = len(chunk_ends), max(map(len, chunk_ends))
    weights = torch.zeros(rows, columns, padded_tokens)
    chunk_of_token = torch.zeros(rows, padded_tokens, dtype=torch.int64)
    is_last = torch.zeros(rows, columns, dtype=torch.bool)
    is_early = torch.zeros(rows, columns, dtype=torch.bool)
    is_tail = torch.zeros(rows, padded_tokens, dtype=torch.bool)
    for row, ends in enumerate(chunk_ends):
        start = 0
        for column, end in enumerate(ends):
            span = PromptSpan(computed=start, scheduled=end - start, prompt_len=ends[-1])
            for segment in pooled_segments(span, pool_tokens, pool_prefix):
                weights[row, column, segment.start : segment.stop] += 1
            chunk_of_token[row, start:] = column
            start = end
        is_last[row, len(ends) - 1] = True
        is_early[row, : len(ends) - 1] = True
        is_tail[row, max(0, ends[-1] - tail_tokens) : ends[-1]] = True
        weights[row, len(ends) :] = weights[row, len(ends) - 1]
    weights /= weights.sum(dim=-1, keepdim=True)
    return ChunkPlan(weights, chunk_of_token, is_last, is_early, is_tail)


def pool(mean_query: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """Pool pre-RoPE queries.

    Args:
        mean_query: [B, T, H] float32, averaged over heads.
        plan: of the batch.

    Returns: pooled_query_features [B, C, H] float32.
    """
    return torch.bmm(plan.pool_weights, mean_query)
