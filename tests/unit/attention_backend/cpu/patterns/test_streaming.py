"""Exact SPARSE prefill on the CPU against float32 attention over each query's own set of keys.

Oracle: a loop over queries that selects keys [0, S) and (p - W, p] by position, as DESIGN.md,
section 2, says. The cache is written by vLLM's own CPU writer; every key that no query of the chunk
may see (between sinks and window, behind the chunk, other blocks) is NaN, so that reading one
shows, and so is the output before. bfloat16 is bound by twice the error of torch's own attention in
bfloat16.
"""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from flux_vllm.attention_backend.cpu.pages import PageLayout, learn_page_layout
from flux_vllm.attention_backend.cpu.patterns import streaming as on_cpu
from flux_vllm.attention_backend.cpu.patterns.streaming import SinkWindowPrefill
from flux_vllm.attention_backend.cpu.prefill import Chunk
from flux_vllm.patterns import streaming

pytestmark = pytest.mark.vllm

STALE = 2**30


@dataclass(frozen=True)
class Case:
    """A chunk, a pattern and a shape."""

    computed: int
    scheduled: int
    sink: int
    window: int
    block: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32

    def __str__(self) -> str:
        return (
            f"{self.computed}+{self.scheduled}-S{self.sink}-W{self.window}-B{self.block}"
            f"-N{self.heads}-K{self.kv_heads}"
        )

    def visible(self, position: int) -> list[int]:
        """List the keys of one query."""
        return [
            key for key in range(position + 1) if key < self.sink or key > position - self.window
        ]


CASES = [
    # Around sinks + window, whole prompts.
    *(Case(0, n, 32, 128) for n in (1, 31, 32, 33, 159, 160, 161, 500)),
    # Chunks at any offset, one token too.
    *(Case(n, 97, 32, 128) for n in (1, 31, 97, 159, 160, 161, 500, 776)),
    *(Case(n, 1, 32, 128) for n in (1, 159, 160, 161, 600)),
    # No sinks; a window of one token; sinks that end inside a block; window smaller than a tile.
    Case(0, 300, 0, 1),
    Case(300, 300, 0, 1),
    Case(300, 300, 0, 40),
    Case(0, 300, 20, 1),
    Case(200, 100, 1, 1),
    Case(90, 200, 33, 31),
    Case(333, 301, 47, 24),
    # Tiles of 256 queries inside the sinks, and one that leaves them.
    Case(0, 700, 600, 5),
    Case(0, 300, 600, 5),
    Case(256, 600, 300, 200),
    # A window longer than everything; sinks longer than everything.
    Case(100, 300, 16, 5000),
    Case(100, 300, 5000, 16),
    # Where the window's first block is the sinks' last, and the one after it.
    *(Case(computed, 40, 40, 20) for computed in (58, 59, 60, 82, 83, 84, 85, 115, 116)),
    # Blocks, heads.
    Case(333, 301, 47, 100, block=128),
    Case(333, 301, 140, 300, block=128),
    Case(60, 200, 20, 30, block=16, head_dim=64),
    *(Case(150, 120, 40, 50, heads=8, kv_heads=k) for k in (8, 4, 2, 1)),
    Case(150, 120, 40, 50, heads=9, kv_heads=3),
]


@dataclass
class Made:
    """Tensors of a case."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    row: torch.Tensor
    layout: PageLayout


def make(case: Case, dtype: torch.dtype) -> Made:
    """Write a request's keys into a cache that is NaN wherever this chunk may not look."""
    end = case.computed + case.scheduled
    blocks = -(-end // case.block)
    row = torch.full((blocks + 2,), STALE, dtype=torch.int32)
    row[:blocks] = torch.randperm(blocks + 3)[:blocks] + 1
    query = torch.randn(case.scheduled, case.heads, case.head_dim).to(dtype)
    key, value = torch.randn(2, end, case.kv_heads, case.head_dim).to(dtype)
    first_window = max(0, case.computed - case.window + 1)
    hidden = slice(min(case.sink, first_window), first_window)
    poisoned = [tensor.clone() for tensor in (key, value)]
    for tensor in poisoned:
        tensor[hidden] = float("nan")
    cache = torch.full(
        (blocks + 4, case.kv_heads, case.block, 2 * case.head_dim), float("nan"), dtype=dtype
    )
    isa = "vec" if case.block % 32 == 0 else "vec16"
    layout = learn_page_layout(isa, case.block, case.head_dim, dtype)
    positions = torch.arange(end)
    slots = row[positions // case.block].long() * case.block + positions % case.block
    halves = cache.view(len(cache), case.kv_heads, 2 * case.block, -1).chunk(2, dim=2)
    torch.ops._C.cpu_attn_reshape_and_cache(*poisoned, *halves, slots, isa, 1.0, 1.0, "auto")
    return Made(query, key, value, cache, row, layout)


def pattern_of(sink: int, window: int) -> streaming.Pattern:
    return streaming.Pattern(sink_tokens=sink, window_tokens=window)


def attend(case: Case, made: Made) -> torch.Tensor:
    chunk = Chunk(case.computed, case.scheduled, len(made.key), made.row, case.block)
    prefill = SinkWindowPrefill(pattern_of(case.sink, case.window), chunk)
    output = torch.full_like(made.query, float("nan"))
    for _ in range(2):  # one plan serves every SPARSE layer of a step
        prefill.attend(made.query, made.cache, made.layout, 0.3, None, output)
    return output


def by_definition(case: Case, made: Made) -> torch.Tensor:
    output = torch.empty(case.scheduled, case.heads, case.head_dim)
    group = case.heads // case.kv_heads
    key, value = (t.float().repeat_interleave(group, dim=1) for t in (made.key, made.value))
    for index in range(case.scheduled):
        seen = case.visible(case.computed + index)
        scores = torch.einsum("nh,knh->nk", made.query[index].float(), key[seen]) * 0.3
        output[index] = torch.einsum("nk,knh->nh", scores.softmax(dim=-1), value[seen])
    return output


def in_torch(case: Case, made: Made) -> torch.Tensor:
    """Attend in the low dtype by torch alone."""
    mask = torch.zeros(case.scheduled, len(made.key), dtype=torch.bool)
    for index in range(case.scheduled):
        mask[index, case.visible(case.computed + index)] = True
    query, key, value = (t.transpose(0, 1)[None] for t in (made.query, made.key, made.value))
    return functional.scaled_dot_product_attention(
        query, key, value, mask, scale=0.3, enable_gqa=True
    )[0].transpose(0, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_definition(case: Case) -> None:
    made = make(case, torch.float32)
    torch.testing.assert_close(attend(case, made), by_definition(case, made), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "case", [Case(0, 300, 32, 128), Case(333, 301, 47, 24), Case(60, 90, 0, 1)], ids=str
)
def test_bfloat16_is_as_exact_as_torch(case: Case) -> None:
    made = make(case, torch.bfloat16)
    expected = by_definition(case, made)
    allowed = (in_torch(case, made).float() - expected).abs().max()
    found = attend(case, made)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 2 * allowed + 1e-6


@pytest.mark.parametrize("tile", [1, 7, 32, 100], ids=lambda t: f"tile{t}")
def test_tile_size_changes_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(90, 105, 33, 31)
    made = make(case, torch.float32)
    monkeypatch.setattr(on_cpu, "_TILE_QUERIES", tile)
    torch.testing.assert_close(attend(case, made), by_definition(case, made), rtol=0, atol=2e-5)


def test_reads_only_blocks_of_sinks_and_window() -> None:
    """A late chunk costs as many blocks as the pattern, not as the context."""
    row = torch.arange(1, 400, dtype=torch.int32)
    prefill = SinkWindowPrefill(pattern_of(40, 100), Chunk(10_000, 64, 20_000, row, 32))
    first = (10_000 - 100 + 1) // 32
    assert prefill.blocks.tolist() == [1, 2, *range(first + 1, -(-10_064 // 32) + 1)]
