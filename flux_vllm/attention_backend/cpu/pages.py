"""Read keys and values back from vLLM's CPU KV cache, whatever order its kernels keep them in.

vLLM's CPU kernels store a block's keys packed for the instruction set in use (transposed for
plain vectors, interleaved for AMX). Instead of repeating each packing here, the order is learned
once from vLLM's own writer: numbered keys go in, and where each number lands is the order.
"""

import functools
from dataclasses import dataclass, replace

import torch
from vllm import _custom_ops as ops

from flux_vllm.errors import UnsupportedConfigurationError

_DIGIT = 8  # whole numbers up to 8 are exact in every dtype of a cache, float8 of two bits too
_FLOAT8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""The elements that vLLM keeps as bytes, by what it calls a cache of them."""


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
class _Scaled:
    """What a layer's float8 elements stand for."""

    float8: torch.dtype
    dtype: torch.dtype
    """Of the model."""
    key_scale: float
    value_scale: float

    def expand(self, stored: torch.Tensor, scale: float) -> torch.Tensor:
        """Turn bytes into numbers of the model."""
        return (stored.view(self.float8).float() * scale).to(self.dtype)


@dataclass(frozen=True, slots=True)
class PageLayout:
    """How one KV cache keeps the keys and values of a block."""

    keys: _Order
    values: _Order
    scaled: _Scaled | None = None
    """None where the cache has the model's dtype."""

    def of_layer(
        self, kv_cache_dtype: str, dtype: torch.dtype, key_scale: float, value_scale: float
    ) -> "PageLayout":
        """Return the layout of a layer, by vLLM's name of its cache's dtype and its scales."""
        if kv_cache_dtype not in _FLOAT8:
            return self
        return replace(self, scaled=_Scaled(_FLOAT8[kv_cache_dtype], dtype, key_scale, value_scale))

    def gather(
        self, kv_cache: torch.Tensor, blocks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy whole blocks out of the cache.

        Args:
            kv_cache: [num_blocks, kv_heads, block_size, 2 * head_dim], as vLLM binds it.
            blocks: [n] int64 physical block ids.

        Returns: keys and values, each [kv_heads, n * block_size, head_dim], token order; those of
            float8 in the model's dtype, with their scales.
        """
        pages = kv_cache[blocks].transpose(0, 1).flatten(2)
        stored_keys, stored_values = pages.chunk(2, dim=-1)
        keys = self.keys.unpack(stored_keys).flatten(1, 2)
        values = self.values.unpack(stored_values).flatten(1, 2)
        if self.scaled is None:
            return keys, values
        return (
            self.scaled.expand(keys, self.scaled.key_scale),
            self.scaled.expand(values, self.scaled.value_scale),
        )


@functools.cache
def learn_page_layout(
    isa: str, block_size: int, head_dim: int, dtype: torch.dtype, kv_cache_dtype: str = "auto"
) -> PageLayout:
    """Find out in which order vLLM's CPU kernels keep a block.

    Args:
        isa: vLLM's name of the instruction set in use, `layer.isa`.
        block_size: tokens a block.
        head_dim: of keys and values.
        dtype: of the model, which a cache has too unless it is float8.
        kv_cache_dtype: vLLM's name of the cache's dtype.

    Returns: PageLayout.
    Raises: UnsupportedConfigurationError: the writer does not merely reorder.
    """
    numbers = torch.arange(block_size * head_dim).view(block_size, 1, head_dim)
    float8 = _FLOAT8.get(kv_cache_dtype)
    stored, unit = torch.zeros(2 * block_size * head_dim, dtype=torch.int64), 1
    while unit < numbers.numel():
        digits = (numbers // unit % _DIGIT).to(dtype)
        cache = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=torch.uint8 if float8 else dtype)
        halves = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            digits,
            digits,
            *halves,
            torch.arange(block_size),
            isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=kv_cache_dtype if float8 else "auto",
        )
        stored += unit * cache.view(float8 or dtype).float().flatten().long()
        unit *= _DIGIT
    keys, values = (_order(half, block_size, head_dim, isa) for half in stored.chunk(2))
    return PageLayout(keys, values)


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
