"""Float32 oracle of every attention path: what is computed, with no regard to speed.

Imports torch only, loops over requests, and shares no code with the package.

Dimension legend: R requests, T packed tokens, Q queries of one request, S keys of one request,
N query heads, K kv heads, H head dim, B KV blocks, M block-table width.
"""

import math
from collections.abc import Callable

import torch

FULL = 1
SPARSE = 0


def compacted_blocks(
    first_position: int, seq_len: int, sink_tokens: int, window_tokens: int, block_size: int
) -> list[int]:
    """List the logical blocks that a SPARSE decode row keeps, in order.

    Args:
        first_position: of the row's first query in this step.
        seq_len: tokens, this step's queries included.
        sink_tokens: widened to the end of the block that holds the last sink.
        window_tokens: of the first query, widened to the start of the block where it begins.
        block_size: tokens a block.
    """
    kept = []
    window_start = max(0, first_position - window_tokens + 1)
    for block in range(math.ceil(seq_len / block_size)):
        begin, end = block * block_size, (block + 1) * block_size
        if begin < sink_tokens or end > window_start:
            kept.append(block)
    return kept


def prefill_mask(
    positions: range, route: int, sink_tokens: int, window_tokens: int
) -> torch.Tensor:
    """Build the mask [Q, S] bool of a prefill chunk; S ends with the last query.

    A SPARSE query sees the first `sink_tokens` and the latest `window_tokens`, its own included.
    """
    key = torch.arange(positions.stop)
    query = key[positions.start :, None]
    seen = key <= query
    if route == SPARSE:
        seen &= (key < sink_tokens) | (key > query - window_tokens)
    return seen


def decode_mask(
    positions: range, route: int, sink_tokens: int, window_tokens: int, block_size: int
) -> torch.Tensor:
    """Build the mask [Q, S] bool of a decode row, its edges widened to whole blocks."""
    seen = prefill_mask(positions, FULL, sink_tokens, window_tokens)
    if route == SPARSE:
        kept = compacted_blocks(
            positions.start, positions.stop, sink_tokens, window_tokens, block_size
        )
        seen &= torch.isin(torch.arange(positions.stop) // block_size, torch.tensor(kept))
    return seen


def gather_pages(cache: torch.Tensor, blocks: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Read one request's keys or values from the paged cache.

    Args:
        cache: [B, block_size, K, H], any strides.
        blocks: [M] physical block ids; entries past the request's length are not read.
        num_keys: S.

    Returns: [S, K, H].
    """
    block_size = cache.shape[1]
    used = blocks[: math.ceil(num_keys / block_size)].long()
    return cache[used].reshape(-1, *cache.shape[2:])[:num_keys]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    dtype: torch.dtype = torch.float32,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend over a mask, every step in `dtype`.

    Args:
        query: [Q, N, H].
        key: [S, K, H], K divides N.
        value: [S, K, H].
        mask: [Q, S] or [N, Q, S] bool, no empty row.
        scale: softmax scale.
        dtype: float32 for the oracle; a low one for the error that plain torch makes.
        sink_logits: [N], beside the scores of each head's queries in their softmax; their weights
            have no value. None for heads without.

    Returns: [Q, N, H] in `dtype`.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    # The query heads of one KV head are stacked as rows: keys are never expanded.
    q_KRH = query.to(dtype).transpose(0, 1).reshape(kv_heads, -1, query.shape[2])
    k_KSH, v_KSH = (x.to(dtype).transpose(0, 1) for x in (key, value))
    scores = (q_KRH @ k_KSH.transpose(1, 2) * scale).view(heads, len(query), len(key))
    scores = scores.masked_fill(~mask.to(scores.device), float("-inf"))
    if sink_logits is not None:
        beside = sink_logits.to(scores)[:, None, None].expand(-1, len(query), 1)
        scores = torch.cat([scores, beside], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(key)]
    attended = weights.reshape(kv_heads, -1, len(key)) @ v_KSH
    return attended.view(heads, len(query), -1).transpose(0, 1)


def attend_batch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    query_lens: list[int],
    seq_lens: list[int],
    block_table: torch.Tensor,
    routes: list[int],
    prefilling: list[bool],
    sink_tokens: int,
    window_tokens: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
    sparse_mask: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend a batch of mixed routes over the paged cache.

    Args:
        query: [T, N, H].
        key_cache: [B, block_size, K, H].
        value_cache: [B, block_size, K, H].
        query_lens: [R] tokens of this step; 0 for a padding row.
        seq_lens: [R] tokens, this step's included; 0 for a padding row.
        block_table: [R, M] int32, entries past a row's length unspecified.
        routes: [R] FULL or SPARSE.
        prefilling: [R] whether the row's queries are prompt tokens.
        sink_tokens: S of the SPARSE pattern.
        window_tokens: W of the SPARSE pattern.
        scale: softmax scale.
        dtype: of the computation, see `attend`.
        sparse_mask: of a SPARSE prefill row, from its number, queries [Q, N, H] and keys [S, K, H];
            None for sinks and window.
        sink_logits: [N] of learned sinks, see `attend`.

    Returns: [T, N, H] in `dtype`; NaN for tokens that belong to no row.
    """
    out = torch.full_like(query, float("nan"), dtype=dtype)
    start = 0
    for row, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        if query_len == 0:
            continue
        positions = range(seq_len - query_len, seq_len)
        key = gather_pages(key_cache, block_table[row], seq_len)
        value = gather_pages(value_cache, block_table[row], seq_len)
        tokens = slice(start, start + query_len)
        if not prefilling[row]:
            mask = decode_mask(
                positions, routes[row], sink_tokens, window_tokens, key_cache.shape[1]
            )
        elif routes[row] == SPARSE and sparse_mask is not None:
            mask = sparse_mask(row, query[tokens], key)
        else:
            mask = prefill_mask(positions, routes[row], sink_tokens, window_tokens)
        out[tokens] = attend(query[tokens], key, value, mask, scale, dtype, sink_logits)
        start += query_len
    return out
