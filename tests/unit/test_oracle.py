"""The one oracle of attention that all tests stand on, held to what it means, key by key.

Oracle: the definitions of DESIGN.md section 2 as sets of keys, XAttention's as sums product by
product, torch's own attention.
"""

import pytest
import torch

from flux_vllm.patterns import make_pattern
from tests.helpers.oracle import naive
from tests.helpers.oracle.masks import SparsePattern, visible
from tests.helpers.reference_router import FULL, SPARSE

assert (FULL, SPARSE) == (naive.FULL, naive.SPARSE)

BLOCK = 128


def keys_by_definition(p: int, route: int, phase: str, pattern: SparsePattern) -> set[int]:
    """List the keys of the query at p."""
    sinks, window, block = pattern.sink_tokens, pattern.window_tokens, pattern.block_size
    causal = set(range(p + 1))
    if route == FULL:
        return causal
    keys = set(range(sinks)) | {k for k in causal if p - window < k <= p}
    if phase == "decode":
        if sinks:
            keys |= {k for k in causal if k // block <= (sinks - 1) // block}
        keys |= {k for k in causal if k // block >= max(0, p - window + 1) // block}
    return keys & causal


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("route", [FULL, SPARSE], ids=["full", "sparse"])
@pytest.mark.parametrize(
    ("sinks", "window", "block"),
    [(0, 1, 16), (1, 1, 16), (16, 16, 16), (17, 30, 16), (15, 33, 32), (5, 7, 1), (3, 200, 128)],
)
def test_masks_are_the_written_sets(
    sinks: int, window: int, block: int, route: int, phase: str
) -> None:
    pattern = SparsePattern(sinks, window, block)
    for start, end in ((0, 90), (40, 90), (89, 90), (149, 150)):
        if phase == "decode":
            mask = naive.decode_mask(range(start, end), route, sinks, window, block)
        else:
            mask = naive.prefill_mask(range(start, end), route, sinks, window)
        assert mask.shape == (end - start, end)
        for row, p in zip(mask, range(start, end), strict=True):
            seen = set(row.nonzero()[:, 0].tolist())
            # Queries of one decode row share the window of the first.
            first = start if phase == "decode" else p
            expected = keys_by_definition(first, route, phase, pattern)
            assert seen == expected | set(range(first + 1, p + 1))


def test_compacted_blocks_widens_both_edges() -> None:
    # Blocks of 4: sinks 0..4 widen to block 1; the window 13..20 begins in block 3.
    assert naive.compacted_blocks(20, 21, 5, 8, 4) == [0, 1, 3, 4, 5]
    # Two queries: the window is the first one's.
    assert naive.compacted_blocks(19, 21, 5, 8, 4) == [0, 1, 3, 4, 5]
    assert naive.compacted_blocks(18, 21, 5, 4, 4) == [0, 1, 3, 4, 5]
    assert naive.compacted_blocks(23, 24, 5, 4, 4) == [0, 1, 5]
    assert naive.compacted_blocks(8, 9, 5, 8, 4) == [0, 1, 2]
    assert naive.compacted_blocks(0, 0, 5, 8, 4) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_head", [False, True])
def test_attend_matches_torch(by_head: bool, dtype: torch.dtype) -> None:
    query, key, value = torch.randn(7, 6, 16), *torch.randn(2, 9, 2, 16)
    mask = torch.rand(6, 7, 9) < 0.5 if by_head else torch.ones(7, 9, dtype=torch.bool).tril(2)
    mask[..., 0] = True
    out = naive.attend(query, key, value, mask, 0.3, dtype)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.to(dtype).transpose(0, 1) for x in (query, key, value)),
        attn_mask=mask,
        scale=0.3,
        enable_gqa=True,
    ).transpose(0, 1)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out, expected, rtol=0, atol=bound)


# Whole prompts; chunks within blocks and strides, on their edges, across the tail; one query.
SPANS = [(0, 50, 50), (0, 300, 300), (100, 197, 500), (128, 384, 384), (353, 450, 500)]
SPANS += [(449, 450, 500), (300, 500, 400), (513, 700, 2000)]


@pytest.mark.parametrize(("start", "end", "prompt_len"), SPANS)
def test_triangle_sees_all_from_the_prompts_last_tokens(
    start: int, end: int, prompt_len: int
) -> None:
    pattern = make_pattern("triangle", 40, 70, {"tail_tokens": 50})
    query, key = torch.zeros(end - start, 1, 8), torch.zeros(end, 1, 8)
    mask = visible(pattern, query, key, prompt_len, 1.0)
    for row, p in zip(mask, range(start, end), strict=True):
        route = FULL if p >= prompt_len - 50 else SPARSE
        seen = keys_by_definition(p, route, "prefill", SparsePattern(40, 70, 1))
        assert set(row.nonzero()[:, 0].tolist()) == seen


@pytest.mark.parametrize(("start", "end", "prompt_len"), SPANS)
@pytest.mark.parametrize(("stride", "threshold"), [(16, 0.5), (8, 0.8), (16, 1.0)])
def test_xattention_takes_the_blocks_of_most_mass(
    start: int, end: int, prompt_len: int, stride: int, threshold: float
) -> None:
    pattern = make_pattern("xattention", 40, 70, {"stride": stride, "threshold": threshold})
    query, key = 4 * torch.randn(end - start, 4, 8), torch.randn(end, 2, 8)
    mask = visible(pattern, query, key, prompt_len, 0.3)
    for head in range(4):
        padded = torch.zeros(-(-end // BLOCK) * BLOCK, 2, 8)
        padded[start:end, 0] = query[:, head]
        padded[:end, 1] = key[:, head // 2]
        for block in range(start // BLOCK, -(-end // BLOCK)):
            kept = _kept(padded, block, range(start, end), stride, threshold)
            for position in range(max(start, block * BLOCK), min(end, (block + 1) * BLOCK)):
                seen = {k for b in kept for k in range(b * BLOCK, (b + 1) * BLOCK)}
                found = set(mask[head, position - start].nonzero()[:, 0].tolist())
                assert found == {k for k in seen if k <= position}


def _kept(
    padded: torch.Tensor, block: int, queries: range, stride: int, threshold: float
) -> list[int]:
    """Choose a query block's key blocks, from queries and keys [positions, 2, H] by grid."""
    mass = [0.0] * (block + 1)
    rows = range(block * BLOCK // stride, (block + 1) * BLOCK // stride)
    # Strided rows that have a query in the chunk.
    present = [r for r in rows if (r + 1) * stride > queries.start and r * stride < queries.stop]
    for row in present:
        scores = []
        for column in range(row + 1):
            at = padded[row * stride : (row + 1) * stride, 0]
            keys = padded[column * stride : (column + 1) * stride, 1]
            scores.append((at.flip(0) * keys).sum() * 0.3 / stride)
        for column, weight in enumerate(torch.stack(scores).softmax(dim=0).tolist()):
            mass[column * stride // BLOCK] += weight
    kept = sorted({0, block})
    others = sorted(range(1, block), key=lambda other: -mass[other])
    while sum(mass[b] for b in kept) < threshold * len(present) and others:
        kept.append(others.pop(0))
    return kept
