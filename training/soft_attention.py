"""FULL and SPARSE attention over whole padded prompts, and the mixture of the two.

Rows are padded at their end, so causality alone keeps padding out of every real token.

Dimension legend: B prompts, N query heads, K kv heads, T padded tokens, H head dim, S sink
tokens, W window tokens.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional

from training.block_attention import BLOCK, block_lists

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Function of q [B, N, T, H], k and v [B, K, T, H] and the scale, to [B, N, T, H]."""


def full_attention(
    q_BNTH: torch.Tensor, k_BKTH: torch.Tensor, v_BKTH: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend to every key up to the query's own.

    Returns: [B, N, T, H].
    """
    return functional.scaled_dot_product_attention(
        q_BNTH, k_BKTH, v_BKTH, is_causal=True, scale=scale, enable_gqa=True
    )


def make_sparse_attention(kernel: str, sink_tokens: int, window_tokens: int) -> Attention:
    """Choose an implementation of sink+window attention.

    Args:
        kernel: `flex` (GPU, compiled) or `sdpa` (anywhere).
        sink_tokens: S, at most W.
        window_tokens: W, the query's own key included.

    Returns: Attention.
    Raises: ValueError: unknown kernel, or S > W.
    """
    if sink_tokens > window_tokens:
        raise ValueError(
            f"expected sink_tokens of at most window_tokens ({window_tokens}), found "
            f"{sink_tokens}; enlarge the window"
        )
    if kernel == "flex":
        return _FlexSinkWindow(sink_tokens, window_tokens)
    if kernel == "sdpa":
        return _BlockedSinkWindow(sink_tokens, window_tokens)
    raise ValueError(f"expected a sparse kernel 'flex' or 'sdpa', found {kernel!r}")


class _BlockedSinkWindow:
    """Sink+window attention as dense attention over blocks of W queries.

    A block of queries sees the sinks, the block before it and itself, S + 2W keys under one mask
    that all blocks but the first two share; time and memory grow linearly with T.
    """

    def __init__(self, sink_tokens: int, window_tokens: int) -> None:
        self.sink = sink_tokens
        self.window = window_tokens

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        tokens, window = q.shape[2], self.window
        # Not enable_gqa: with a mask it leaves the GPU only the kernel that needs [T, T] memory.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        head = min(tokens, 2 * window)
        begin = functional.scaled_dot_product_attention(
            q[:, :, :head],
            k[:, :, :head],
            v[:, :, :head],
            attn_mask=_dense_mask(head, self.sink, window, q.device),
            scale=scale,
        )
        if tokens <= 2 * window:
            return begin
        padding = -tokens % window
        q, k, v = (functional.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        blocks = q.shape[2] // window - 2
        # Heads beside blocks in the batch: [B, N, T, H] to [B * blocks, N, W, H].
        rest = functional.scaled_dot_product_attention(
            q[:, :, head:].unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1),
            self._visible(k, blocks),
            self._visible(v, blocks),
            attn_mask=_block_mask(self.sink, window, q.device),
            scale=scale,
        )
        rest = rest.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)
        return torch.cat([begin, rest[:, :, : tokens - head]], dim=2)

    def _visible(self, x: torch.Tensor, blocks: int) -> torch.Tensor:
        """Gather each block's keys: [B, N, T, H] to [B * blocks, N, S + 2W, H]."""
        parts = x.unflatten(2, (-1, self.window))
        sinks = x[:, :, None, : self.sink].expand(-1, -1, blocks, -1, -1)
        seen = torch.cat([sinks, parts[:, :, 1:-1], parts[:, :, 2:]], dim=3)
        return seen.transpose(1, 2).flatten(0, 1)


@cache
def _dense_mask(tokens: int, sink: int, window: int, device: torch.device) -> torch.Tensor:
    """[T, T] bool of sink+window attention."""
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & ((distance < window) | (position[None, :] < sink))


@cache
def _block_mask(sink: int, window: int, device: torch.device) -> torch.Tensor:
    """[W, S + 2W] bool: a block's queries against sinks, the block before and the block."""
    row = torch.arange(window, device=device)
    before = row[None, :] > row[:, None]
    sinks = torch.ones(window, sink, dtype=torch.bool, device=device)
    return torch.cat([sinks, before, ~before], dim=1)


class _FlexSinkWindow:
    """Sink+window attention through torch's flex_attention, compiled on first use."""

    def __init__(self, sink_tokens: int, window_tokens: int) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self._flex: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
        self._masks: dict[tuple[int, torch.device], Any] = {}
        self._make_mask = partial(sink_window_mask, sink_tokens, window_tokens)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        key = (q.shape[2], q.device)
        if key not in self._masks:
            self._masks[key] = self._make_mask(*key)
        out = self._flex(q, k, v, block_mask=self._masks[key], scale=scale, enable_gqa=True)
        return out  # type: ignore[no-any-return]


# One function whatever the length: flex_attention is compiled anew for another.
@cache
def _visible(sink_tokens: int, window_tokens: int) -> Callable[..., torch.Tensor]:
    """Return flex_attention's mask of single pairs."""

    def visible(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        return (q >= kv) & ((q - kv < window_tokens) | (kv < sink_tokens))

    return visible


def sink_window_mask(
    sink_tokens: int, window_tokens: int, tokens: int, device: torch.device
) -> Any:
    """Make flex_attention's BlockMask of sinks and window from its blocks alone.

    torch's `create_block_mask` looks at every pair of tokens: 8 GiB for 32,768 of them.

    Args:
        sink_tokens: S.
        window_tokens: W, the query's own key included.
        tokens: T.
        device: of the mask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first = torch.arange(0, tokens, BLOCK, device=device)
    last = first + BLOCK - 1
    q_first, q_last, key_first, key_last = first[:, None], last[:, None], first, last
    any_seen = (key_first < sink_tokens) | (q_first - key_last < window_tokens)
    any_seen &= key_first <= q_first
    # Of a block's keys those beyond the sinks must lie in the last query's window. Blocks that the
    # sequence ends in, and the diagonal's, are masked within.
    farthest = key_first.clamp(min=sink_tokens)
    all_seen = (key_last < sink_tokens) | (q_last - farthest < window_tokens)
    all_seen &= (key_first < q_first) & (q_last < tokens)
    return BlockMask.from_kv_blocks(
        *block_lists((any_seen & ~all_seen)[None, None]),
        *block_lists(all_seen[None, None]),
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(sink_tokens, window_tokens),
        seq_lengths=(tokens, tokens),
    )


def mix(full: torch.Tensor, sparse: torch.Tensor, z_BT: torch.Tensor) -> torch.Tensor:
    """Mix the two outputs token by token.

    Args:
        full: [B, N, T, H], FULL attention.
        sparse: [B, N, T, H], SPARSE attention.
        z_BT: [B, T], 1 for FULL and 0 for SPARSE; exact at these two values.

    Returns: [B, N, T, H] in the dtype of `full`.
    """
    z = z_BT[:, None, :, None].to(full.dtype)
    return z * full + (1 - z) * sparse
