"""The oracle itself, against definitions written out by hand."""

import pytest
import torch

from flux_vllm.attention_backend import naive


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0, {0}),
        (2, {0, 1, 2}),
        (4, {0, 1, 2, 3, 4}),  # sink 2 + window 3: the last query that sees everything
        (5, {0, 1, 3, 4, 5}),
        (9, {0, 1, 7, 8, 9}),
    ],
)
def test_visible_keys_under_sparse(position: int, expected: set[int]) -> None:
    assert naive.visible_keys(position, naive.SPARSE, 2, 3) == expected
    assert naive.visible_keys(position, naive.FULL, 2, 3) == set(range(position + 1))


def test_visible_keys_counts_an_overlap_once() -> None:
    assert naive.visible_keys(4, naive.SPARSE, 4, 4) == {0, 1, 2, 3, 4}


def test_compacted_blocks_widens_both_edges() -> None:
    # Blocks of 4: sinks 0..4 widen to block 1; the window 13..20 begins in block 3.
    assert naive.compacted_blocks(20, 21, 5, 8, 4) == [0, 1, 3, 4, 5]
    # Two queries: the window is the first one's.
    assert naive.compacted_blocks(19, 21, 5, 8, 4) == [0, 1, 3, 4, 5]
    assert naive.compacted_blocks(18, 21, 5, 4, 4) == [0, 1, 3, 4, 5]
    assert naive.compacted_blocks(23, 24, 5, 4, 4) == [0, 1, 5]
    assert naive.compacted_blocks(8, 9, 5, 8, 4) == [0, 1, 2]
    assert naive.compacted_blocks(0, 0, 5, 8, 4) == []


def test_decode_mask_never_has_fewer_keys_than_prefill() -> None:
    for first in range(40):
        positions = range(first, first + 3)
        exact = naive.prefill_mask(positions, naive.SPARSE, 5, 9)
        widened = naive.decode_mask(positions, naive.SPARSE, 5, 9, 4)
        assert (widened | ~exact).all()


def test_attend_matches_torch() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(7, heads, 16) for heads in (6, 2, 2))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    out = naive.attend(query, key, value, mask, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        attn_mask=mask,
        scale=0.3,
        enable_gqa=True,
    ).transpose(0, 1)
    torch.testing.assert_close(out, expected)
