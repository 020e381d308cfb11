"""What is called before the first request is every kernel that serving can call.

Oracle: the kernels' own choice of what they are compiled for, asked for every batch within limits.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_vllm.attention_backend.cuda.calls import DecodeCase, Limits, Sizes
from flux_vllm.attention_backend.cuda.fa3_calls import FA3Kernels
from flux_vllm.attention_backend.cuda.patterns import long_contexts
from flux_vllm.attention_backend.cuda.triton_calls import SharedWorkspace, TritonKernels
from flux_vllm.attention_backend.kernels import sink_merge, triton_prefill
from flux_vllm.attention_backend.kernels.decode_plan import CallShape, plan_variant
from flux_vllm.attention_backend.kernels.triton_decode import (
    QUERIES,
    DecodeWorkspace,
    choose_num_splits,
    most_shares,
    query_tile,
)
from flux_vllm.patterns import make_pattern

pytestmark = pytest.mark.vllm

NUM_SMS = 132
LIMITS = [Limits(64, 64, 8192, 1), Limits(300, 304, 16384, 4), Limits(40, 40, 512, 12)]
SHAPES = [(32, 8, 128), (12, 2, 128), (9, 3, 64), (8, 8, 256)]


@pytest.fixture(autouse=True)
def _a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_merge, "INTERPRETED", False)
    monkeypatch.setattr(triton_prefill, "INTERPRETED", False)
    monkeypatch.setattr(triton_prefill, "is_hopper", lambda: True)


def layer(heads: int, kv_heads: int, head_dim: int) -> Any:
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_size": head_dim}
    return SimpleNamespace(**sizes, scale=1.0, sinks=None, is_float8=False)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fa3(shape: tuple[int, int, int], limits: Limits) -> None:
    variants = FA3Kernels(layer(*shape), Sizes(64, 1024, NUM_SMS)).variants(limits)
    call = CallShape(*shape, NUM_SMS)
    called = {plan_variant(call, case.rows, case.max_query_len) for case in variants.decode}
    for queries in range(1, limits.step_tokens + 1):
        for rows in range(1, limits.rows + 1):
            assert plan_variant(call, rows, queries) in called
    assert len(variants.decode) == len(called)
    for sinks in (16, 64, 300):
        tiles = [sink_merge.default_tile(shape[2], sinks, tokens) for tokens in variants.prefill]
        for tokens in range(1, limits.tokens + 1):
            assert sink_merge.default_tile(shape[2], sinks, tokens) in tiles


def test_fa3_over_a_float8_cache_has_no_plans() -> None:
    """So one decode batch calls all there is, and no step is planned for."""
    of_float8 = layer(32, 8, 128)
    of_float8.is_float8 = True
    kernels = FA3Kernels(of_float8, Sizes(64, 1024, NUM_SMS))
    variants = kernels.variants(LIMITS[1])
    assert variants.decode == [DecodeCase(1, 1, 1)]
    assert (
        variants.prefill
        == FA3Kernels(layer(32, 8, 128), Sizes(64, 1024, NUM_SMS)).variants(LIMITS[1]).prefill
    )
    metadata: Any = SimpleNamespace(max_num_splits=32)
    assert kernels.plan(None, metadata) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape: tuple[int, int, int], limits: Limits) -> None:
    heads, kv_heads, head_dim = shape
    kernels = TritonKernels(layer(*shape), Sizes(64, 1024, NUM_SMS), SharedWorkspace(NUM_SMS))
    variants = kernels.variants(limits)
    vectors = QUERIES * most_shares(limits.capacity, kv_heads, NUM_SMS) * heads
    workspace = DecodeWorkspace(
        torch.empty(vectors * head_dim, device="meta"), torch.empty(vectors, device="meta"), 1
    )

    def variant(rows: int, tokens: int, most_queries: int) -> tuple[int, int]:
        wanted = choose_num_splits(rows, kv_heads, NUM_SMS)
        splits = workspace.fit(wanted, tokens, heads, head_dim).num_splits
        return splits, query_tile(most_queries, heads // kv_heads)

    called = {variant(c.rows, c.rows * c.queries, c.max_query_len) for c in variants.decode}
    for queries in range(1, limits.step_tokens + 1):
        for rows in range(1, limits.rows + 1, 3):
            for tokens in range(rows, rows * queries + 1, 5):
                assert variant(rows, tokens, queries) in called
    group = heads // kv_heads
    tiles = [triton_prefill.default_tile(head_dim, 2, group, n) for n in variants.prefill]
    for tokens in range(1, limits.tokens + 1):
        assert triton_prefill.default_tile(head_dim, 2, group, tokens) in tiles


@pytest.mark.parametrize("name", ["streaming", "triangle", "xattention"])
@pytest.mark.parametrize("max_len", [4096, 131_072, 131_073, 1_000_000])
def test_long_contexts(name: str, max_len: int) -> None:
    from flux_vllm.attention_backend.kernels.block_choice import LEAST_WIDTH
    from flux_vllm.attention_backend.kernels.tiles import power_of_two

    lengths = long_contexts(make_pattern(name, 64, 1024, {}), max_len)
    assert all(length <= max_len for length in lengths)

    def width(length: int) -> int:
        return max(LEAST_WIDTH, power_of_two(-(-length // 128)))

    wanted = {width(length) for length in range(1, max_len + 1, 1000)} | {width(max_len)}
    found = {width(length) for length in [1, *lengths]}
    assert found == (wanted if name == "xattention" else {LEAST_WIDTH})
