"""Block-sparse attention for the pattern `xattention`: choose key blocks, attend to them.

`flux_vllm.patterns.xattention` defines what is chosen; this is the same for
padded batches.

Dimension legend: B prompts, N query heads, K kv heads, T padded tokens (whole blocks), H head dim,
Q query blocks and M key blocks (T / 128 both), G strided rows a block (128 / stride).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from training.sparse_patterns import BLOCK, XAttention


@dataclass(frozen=True, slots=True)
class ChosenBlocks:
    """What one chunk of each prompt attends to."""

    kept: torch.Tensor
    """[B, N, Q, M] bool; false for query blocks that no prompt's chunk reaches."""
    queries: torch.Tensor
    """[B, T] bool: the chunk's positions."""

    def visited_keys(self) -> torch.Tensor:
        """Sum the keys that each prompt's chunk attends to, averaged over heads: [B] float32."""
        blocks = self.queries.unflatten(1, (-1, BLOCK)).float()
        before = self.kept.tril(-1).sum(dim=-1).float().mean(dim=1) * BLOCK
        own = torch.arange(1, BLOCK + 1, device=blocks.device, dtype=blocks.dtype)
        return (blocks.sum(dim=-1) * before + blocks @ own).sum(dim=-1)


def pad_to_blocks(x: torch.Tensor) -> torch.Tensor:
    """Pad tokens, the third dimension of four, with zeros to whole blocks."""
    missing = -x.shape[2] % BLOCK
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


def choose_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    pattern: XAttention,
    scale: float,
) -> ChosenBlocks:
    """Choose the key blocks of one chunk of each prompt.

    Args:
        q: [B, N, T, H].
        k: [B, K, T, H].
        starts: B positions where the chunks begin.
        ends: B positions where they end; start == end for none, but not for all.
        pattern: threshold and stride.
        scale: of the scores.

    Returns: ChosenBlocks.
    """
    stride, rows = pattern.stride, BLOCK // pattern.stride
    batch, heads, tokens, _ = q.shape
    # Prompts without this chunk do not widen what is looked at.
    first = min(s for s, e in zip(starts, ends, strict=True) if s < e) // BLOCK
    last = -(-max(ends) // BLOCK)
    begin, end = (torch.tensor(edge, device=q.device)[:, None] for edge in (starts, ends))
    position = torch.arange(tokens, device=q.device)
    inside = (position >= begin) & (position < end)
    # The chunk's own queries and the keys up to its end; zeros stand for the others.
    chunk = slice(first * BLOCK, last * BLOCK)
    q = q[:, :, chunk].where(inside[:, None, chunk, None], 0)
    k = k[:, :, : chunk.stop].where((position < end)[:, None, : chunk.stop, None], 0)
    strided_q = q.float().unflatten(2, (-1, stride)).flip(3).flatten(3)
    strided_k = k.float().unflatten(2, (-1, stride)).flatten(3)
    scores = strided_q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ strided_k.transpose(2, 3)
    scores = scores.view(batch, heads, -1, last * rows) * (scale / stride)

    row = torch.arange(first * rows, last * rows, device=q.device)
    later = torch.arange(last * rows, device=q.device) > row[:, None]
    weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
    # Strided rows without a query of the chunk do not count.
    present = ((row + 1) * stride > begin) & (row * stride < end)
    mass = (weights * present[:, None, :, None]).unflatten(3, (-1, rows)).sum(dim=4)
    mass = mass.unflatten(2, (-1, rows)).sum(dim=3)
    needed = pattern.threshold * present.unflatten(1, (-1, rows)).sum(dim=2)[:, None, :, None]

    block = torch.arange(first, last, device=q.device)[:, None]
    column = torch.arange(last, device=q.device)
    forced = (column == 0) | (column == block)
    needed = needed - (mass * forced).sum(dim=-1, keepdim=True)
    others, order = mass.masked_fill(forced, 0).sort(dim=-1, descending=True)
    # One is needed as long as those before it do not suffice.
    wanted = others.cumsum(dim=-1) - others < needed
    kept = (forced | torch.zeros_like(wanted).scatter(3, order, wanted)) & (column <= block)
    behind = tokens // BLOCK - last
    return ChosenBlocks(functional.pad(kept, (0, behind, first, behind)), inside)


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
    kernel: str,
) -> torch.Tensor:
    """Attend to the kept blocks, up to each query's own position.

    Args:
        q: [B, N, T, H].
        k: [B, K, T, H].
        v: [B, K, T, H].
        kept: [B, N, Q, M] bool; a query block keeps its own block, or none.
        scale: of the scores.
        kernel: `flex` (GPU, compiled) or `sdpa` (anywhere).

    Returns: [B, N, T, H]; without meaning where nothing was kept.
    """
    if kernel == "flex":
        out = _compiled_flex()(q, k, v, make_block_mask(kept), scale)
        return out  # type: ignore[no-any-return]
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = torch.zeros_like(q)
    for block in kept.any(dim=(0, 1, 3)).nonzero()[:, 0].tolist():
        begin, end = block * BLOCK, (block + 1) * BLOCK
        position = torch.arange(end, device=q.device)
        causal = position <= position[begin:, None]
        mask = kept[:, :, block, : block + 1].repeat_interleave(BLOCK, dim=2)[:, :, None] & causal
        out[:, :, begin:end] = functional.scaled_dot_product_attention(
            q[:, :, begin:end], k[:, :, :end], v[:, :, :end], attn_mask=mask, scale=scale
        )
    return out


def make_block_mask(kept: torch.Tensor) -> Any:
    """Turn kept blocks [B, N, Q, M] into flex_attention's BlockMask.

    Only the diagonal's blocks are masked within; those below it are visible as a whole.
    """
    from torch.nn.attention.flex_attention import BlockMask

    own = torch.eye(kept.shape[2], dtype=torch.bool, device=kept.device)
    return BlockMask.from_kv_blocks(
        *block_lists(kept & own), *block_lists(kept & ~own), BLOCK_SIZE=BLOCK, mask_mod=_is_causal
    )


def block_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the counts [B, N, Q] and the indices [B, N, Q, M] of blocks, int32, for a BlockMask."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.int()


# Closes over nothing: flex_attention is compiled for it once, whatever was chosen.
def _is_causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return q >= kv


def _flex_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: Any, scale: float
) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True)


@cache
def _compiled_flex() -> Callable[..., Any]:
    """Compile once; apart from sink+window attention's, whose shapes would count as variants."""
    return torch.compile(_flex_blocks, dynamic=True)
