"""A paged KV cache seen as pages of one KV head each, for calls in which each row has one head.

Dimension legend: K kv heads, H head dim, B KV blocks.
"""

import math
from typing import NamedTuple

import torch

from flux_vllm.attention_backend.kernels.block_tasks import BLOCK_TOKENS


class HeadPages(NamedTuple):
    """A paged cache seen as pages of one KV head each; pages overlap where heads alternate."""

    keys: torch.Tensor
    """[pages, page_tokens, 1, H], a view."""
    values: torch.Tensor
    """Likewise."""
    block_pages: int
    """Pages from one KV block to the next."""
    part_pages: int
    """Pages from one part of a KV block, `page_tokens` long, to the next."""
    head_pages: int
    """Pages from one KV head to the next."""


def page_tokens(block_size: int) -> int:
    """Return the tokens of a page: part of a KV block, and of a key block."""
    return math.gcd(block_size, BLOCK_TOKENS)


def head_pages(key_cache: torch.Tensor, value_cache: torch.Tensor) -> HeadPages:
    """View a paged cache by KV heads, whatever its strides.

    Args:
        key_cache: [B, block_size, K, H], last dimension contiguous.
        value_cache: likewise, with the same strides.
    """
    blocks, block_size, kv_heads, head_dim = key_cache.shape
    of_block, of_token, of_head, of_element = key_cache.stride()
    assert of_element == 1
    assert value_cache.stride() == key_cache.stride()
    tokens = page_tokens(block_size)
    parts = block_size // tokens
    # A stride that is never taken says nothing about where pages may begin.
    of_part = tokens * of_token if parts > 1 else 0
    of_head = of_head if kv_heads > 1 else 0
    unit = math.gcd(of_block, of_part, of_head)
    steps = of_block // unit, of_part // unit, of_head // unit
    last = sum(
        n * step for n, step in zip((blocks - 1, parts - 1, kv_heads - 1), steps, strict=True)
    )
    assert last < 2**31, f"{last} pages, fewer than {2**31}"
    size, stride = (last + 1, tokens, 1, head_dim), (unit, of_token, head_dim, 1)
    return HeadPages(
        key_cache.as_strided(size, stride), value_cache.as_strided(size, stride), *steps
    )
