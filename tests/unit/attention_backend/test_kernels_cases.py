"""Batches for the kernel tests, and the rule that errors are held to.

Oracle: `tests.helpers.oracle.naive`. Everything that a kernel must not read is NaN: block
0, blocks of no row, slots past a row's length; stale ends of the block table point at such blocks.
Outputs start as NaN, so what was left unwritten shows. Of a float8 cache the oracle reads what its
elements stand for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from flux_vllm.attention_backend.kernels.fa3 import Float8Operands
from flux_vllm.attention_backend.kernels.paged import KVCache
from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from flux_vllm.patterns.base import SparsePattern
from tests.helpers.oracle import naive
from tests.helpers.oracle.masks import visible

FULL, SPARSE = naive.FULL, naive.SPARSE

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
"""Where kernels run: in Triton's interpreter, or on a GPU."""
QUERY_SCALE, KEY_SCALE, VALUE_SCALE = 0.25, 0.375, 1.75
"""Of a float8 cache and of the queries that meet it; exact in any dtype."""


@dataclass(frozen=True)
class Row:
    """One request of a batch; a padding row has no tokens."""

    query_len: int
    seq_len: int
    route: int = FULL
    prefill: bool = True
    prompt_len: int | None = None
    """Of a prefill row; None where its chunk completes the prompt."""


@dataclass(frozen=True)
class Shape:
    """Of the model and its cache."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float16
    sink_tokens: int = 20
    window_tokens: int = 24
    learned_sinks: bool = False
    float8: bool = False
    """Whether the cache is float8_e4m3fn; `dtype` is the model's."""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"N{self.heads}-K{self.kv_heads}-H{self.head_dim}-B{self.block_size}-{dtype}"
            f"-S{self.sink_tokens}-W{self.window_tokens}"
            + "-sinks" * self.learned_sinks
            + "-float8" * self.float8
        )


@dataclass
class PagedBatch:
    """Tensors of a batch, on one device."""

    rows: list[Row]
    shape: Shape
    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    sink_logits: torch.Tensor | None
    """[N] of learned sinks."""
    pattern: SparsePattern | None = None
    """Of SPARSE prefill; None for sinks and window."""
    mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """In the place of a pattern's: of a row's query and key, to [N, Q, S] bool."""
    by_fa3: bool = False
    """Whether FlashAttention-3 attends, and not its emulation."""

    @property
    def key_cache(self) -> torch.Tensor:
        return self.kv_cache.transpose(1, 2)[..., : self.shape.head_dim]

    @property
    def value_cache(self) -> torch.Tensor:
        return self.kv_cache.transpose(1, 2)[..., self.shape.head_dim :]

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    @property
    def cache(self) -> KVCache:
        if not self.shape.float8:
            return KVCache(self.key_cache, self.value_cache)
        return KVCache(self.key_cache, self.value_cache, KEY_SCALE, VALUE_SCALE)

    @property
    def meant(self) -> KVCache:
        """What keys and values stand for, for oracles."""
        if not self.shape.float8:
            return self.cache
        return KVCache(self.key_cache.float() * KEY_SCALE, self.value_cache.float() * VALUE_SCALE)

    @property
    def rounding(self) -> float:
        """FlashAttention-3 rounds weights to three bits where the cache is float8."""
        return 2**-4 if self.by_fa3 and self.shape.float8 else 0.0

    @property
    def float8(self) -> Float8Operands | None:
        """What FlashAttention-3 takes over a float8 cache."""
        if not self.shape.float8:
            return None
        query = (self.query.float() / QUERY_SCALE).to(torch.float8_e4m3fn)
        scales = (QUERY_SCALE, KEY_SCALE, VALUE_SCALE)
        return Float8Operands(query, *(torch.tensor(x, device=query.device) for x in scales))

    def poisoned_output(self) -> torch.Tensor:
        return torch.full_like(self.query, float("nan"))

    def tokens_of(self, row: int) -> slice:
        start = sum(r.query_len for r in self.rows[:row])
        return slice(start, start + self.rows[row].query_len)

    def seqused_q(self, chosen: list[bool]) -> torch.Tensor:
        lens = [r.query_len if c else 0 for r, c in zip(self.rows, chosen, strict=True)]
        return torch.tensor(lens, dtype=torch.int32, device=self.query.device)

    def oracle(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Attend by definition; the exact result, or that of plain torch in a low dtype."""
        exact = torch.float64 if self.shape.dtype == torch.float32 else torch.float32
        return naive.attend_batch(
            self.query,
            *self.meant[:2],
            query_lens=[r.query_len for r in self.rows],
            seq_lens=[r.seq_len for r in self.rows],
            block_table=self.block_table,
            routes=[r.route for r in self.rows],
            prefilling=[r.prefill for r in self.rows],
            sink_tokens=self.shape.sink_tokens,
            window_tokens=self.shape.window_tokens,
            scale=self.scale,
            dtype=dtype or exact,
            sparse_mask=(None if self.pattern is None and self.mask is None else self._sparse_mask),
            sink_logits=self.sink_logits,
        )

    def _sparse_mask(self, row: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if self.mask is not None:
            return self.mask(query, key)
        assert self.pattern is not None
        prompt_len = self.rows[row].prompt_len or self.rows[row].seq_len
        return visible(self.pattern, query, key, prompt_len, self.scale).to(query.device)


def make_batch(
    rows: list[Row], shape: Shape, device: str, seed: int = 0, poison: float = float("nan")
) -> PagedBatch:
    """Fill a cache and a batch with random numbers, `poison` wherever nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    # Long batches are drawn where they are needed: seconds each on the host.
    on_device = generator if device == "cpu" else torch.Generator(device).manual_seed(seed)
    size = shape.block_size
    blocks_of = [-(-row.seq_len // size) for row in rows]
    spare = 5
    num_blocks = 1 + sum(blocks_of) + spare
    order = 1 + torch.randperm(num_blocks - 1, generator=generator)
    width = max(blocks_of) + 3
    # The layout of vLLM 0.33: keys and values of a token and head side by side.
    packed = torch.full(
        (num_blocks, size, shape.kv_heads, 2 * shape.head_dim),
        poison,
        dtype=shape.dtype,
        device=device,
    )
    table = order[-spare:][torch.randint(spare, (len(rows), width), generator=generator)]
    slots = []
    for index, row in enumerate(rows):
        blocks = order[sum(blocks_of[:index]) :][: blocks_of[index]]
        table[index, : len(blocks)] = blocks
        filled = torch.full((len(blocks) * size, *packed.shape[2:]), poison, device=device)
        filled[: row.seq_len].normal_(generator=on_device)
        packed[blocks.to(device)] = filled.view(len(blocks), *packed.shape[1:]).to(shape.dtype)
        position = torch.arange(row.seq_len - row.query_len, row.seq_len)
        slots.append(table[index, position // size] * size + position % size)
    query_lens = torch.tensor([0] + [row.query_len for row in rows])
    total = int(query_lens.sum())
    query = torch.empty(total, shape.heads, shape.head_dim, device=device)
    query.normal_(generator=on_device)
    if shape.float8:  # exact in float8, so that those who quantize it read the same
        query = (query / QUERY_SCALE).to(torch.float8_e4m3fn).float() * QUERY_SCALE
    sink_logits = None
    if shape.learned_sinks:  # some weigh more than all keys, some next to nothing
        sink_logits = torch.randn(shape.heads, generator=generator) * 4
        exact = shape.dtype == torch.float32
        sink_logits = sink_logits.to(device, torch.float32 if exact else torch.bfloat16)
    return PagedBatch(
        rows=rows,
        shape=shape,
        query=query.to(shape.dtype),
        kv_cache=(packed.to(torch.float8_e4m3fn) if shape.float8 else packed).transpose(1, 2),
        block_table=table.int().to(device),
        query_start_loc=query_lens.cumsum(0).int().to(device),
        seq_lens=torch.tensor([row.seq_len for row in rows], dtype=torch.int32, device=device),
        slot_mapping=torch.cat(slots).to(device),
        sink_logits=sink_logits,
    )


def assert_as_exact_as_torch(
    result: torch.Tensor,
    exact: torch.Tensor,
    low: torch.Tensor,
    what: str = "",
    rounding: float = 0.0,
) -> None:
    """Hold a result to twice the error of plain torch in its dtype, plus its last bit.

    `rounding` is what a kernel's own rounding may cost besides, by the largest result.
    """
    assert result.isfinite().all(), f"{what}: not finite"
    error = (result.to(exact.dtype) - exact).abs().max().item()
    allowed = (low.to(exact.dtype) - exact).abs().max().item()
    last_bit = exact.abs().max().item() * (torch.finfo(result.dtype).eps + rounding)
    assert error <= 2 * allowed + last_bit, f"{what}: error {error:.3g}, torch's {allowed:.3g}"


def check_rows(batch: PagedBatch, out: torch.Tensor, attended: list[bool]) -> None:
    """Hold attended rows to the oracle; others must be as they were (NaN)."""
    exact, low = batch.oracle(), batch.oracle(batch.shape.dtype)
    for index, row in enumerate(batch.rows):
        tokens = batch.tokens_of(index)
        if attended[index] and row.query_len:
            what = f"row {index} {row}"
            assert_as_exact_as_torch(out[tokens], exact[tokens], low[tokens], what, batch.rounding)
        else:
            assert out[tokens].isnan().all(), f"row {index} {row} was written"


def test_make_batch_poisons_what_no_row_holds() -> None:
    batch = make_batch([Row(2, 5), Row(0, 0), Row(1, 33)], Shape(), "cpu")
    finite = batch.key_cache.isfinite().all(dim=(2, 3))
    assert finite.sum() == 5 + 33
    assert not finite[0].any()
    assert batch.oracle().isfinite().all()
