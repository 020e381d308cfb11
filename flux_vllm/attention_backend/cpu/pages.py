"""Read keys and values back from vLLM's CPU KV cache, whatever order its kernels keep them in.

vLLM's CPU kernels store a block's keys packed for the instruction set in use (transposed for
plain vectors, interleaved for AMX). Instead of repeating each packing here, the order is learned
once from vLLM's own writer: numbered keys go in, and where each number lands is the order.
"""

import functools
from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops

from flux_vllm.errors import UnsupportedConfigurationError

_DIGIT = 256  # whole numbers up to 256 are exact in bfloat16


@dataclass(frozen=True, slots=True)
class _Order:
    """Where the elements of one [block_size, head_dim] half page lie in memory."""

    kind: str
    """`rows`: as they are; `columns`: transposed; `table`: by `index`."""
    index: torch.Tensor
    """[block_size * head_dim] int64: memory position of each element."""
    block_size: int
    head_dim: int

    def unpack(self, pages: torch.Tensor) -> torch.Tensor:
        """[..., block_size * head_dim] in memory order to [..., block_size, head_dim]."""
        if self.kind == "rows":
            return pages.unflatten(-1, (self.block_size, self.head_dim))
        if self.kind == "columns":
            return pages.unflatten(-1, (self.head_dim, self.block_size)).transpose(-1, -2)
        return pages[..., self.index].unflatten(-1, (self.block_size, self.head_dim))


@dataclass(frozen=True, slots=True)
class PageLayout:
    """How one KV cache keeps the keys and values of a block."""

    keys: _Order
    values: _Order

    def gather(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy whole blocks out of the cache.

        Args:
            kv_cache: [num_blocks, kv_heads, block_size, 2 * head_dim], as vLLM binds it.
            blocks: [n] int64 physical block ids.

        Returns: keys and values, each [kv_heads, n * block_size, head_dim], token order.
        """
        pages = kv_cache[blocks].transpose(0, 1).flatten(2)
        keys, values = pages.chunk(2, dim=-1)
        return self.keys.unpack(keys).flatten(1, 2), self.values.unpack(values).flatten(1, 2)


@functools.cache
def learn_page_layout(isa: str, block_size: int, head_dim: int, dtype: torch.dtype) -> PageLayout:
    """Find out in which order vLLM's CPU kernels keep a block.

    Args:
        isa: vLLM's name of the instruction set in use, `layer.isa`.
        block_size: tokens a block.
        head_dim: of keys and values.
        dtype: of the KV cache.

    Returns: PageLayout.
    Raises: UnsupportedConfigurationError: the writer does not merely reorder.
    """
    numbers = torch.arange(block_size * head_dim).view(block_size, 1, head_dim)
    digits = []
    for part in (numbers % _DIGIT, numbers // _DIGIT):
        cache = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            part.to(dtype),
            part.to(dtype),
            keys,
            values,
            torch.arange(block_size),
            isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )
        digits.append(cache.flatten().long())
    stored = digits[0] + _DIGIT * digits[1]
    halves = stored.chunk(2)
    return PageLayout(*(_order(half, block_size, head_dim, isa) for half in halves))


def _order(stored: torch.Tensor, block_size: int, head_dim: int, isa: str) -> _Order:
    identity = torch.arange(block_size * head_dim)
    index = stored.argsort()
    if not torch.equal(stored[index], identity):
        raise UnsupportedConfigurationError(
            f"layer routes on the CPU: expected vLLM's {isa!r} kernels to keep a block's keys and "
            f"values in some order (block_size {block_size}, head_dim {head_dim}), found numbers "
            "missing; serve with --attention-backend CPU_ATTN and report this"
        )
    if torch.equal(index, identity):
        kind = "rows"
    elif torch.equal(index, identity.view(head_dim, block_size).t().flatten()):
        kind = "columns"
    else:
        kind = "table"
    return _Order(kind, index, block_size, head_dim)
