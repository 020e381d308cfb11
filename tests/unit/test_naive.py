"""The oracle itself, against definitions written out by hand."""

import pytest
import torch

from tests.helpers.oracle import naive


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


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 24])
def test_unrotate_undoes_rotate(interleaved: bool, rotary_dim: int) -> None:
    query = torch.randn(9, 3, 32)
    positions = torch.arange(9) * 1000
    inv_freq = 1e4 ** (-torch.arange(rotary_dim // 2) / 16)
    rotated = naive.rotate(query, positions, inv_freq, interleaved, 1.25)
    assert not torch.allclose(rotated, query, atol=0.1)
    back = naive.unrotate(rotated, positions, inv_freq, interleaved, 1.25)
    torch.testing.assert_close(back, query, rtol=1e-5, atol=1e-5)
    if interleaved:
        angle = positions[3] * inv_freq[1]
        turned = query[3, 0, 2] * angle.cos() - query[3, 0, 3] * angle.sin()
        torch.testing.assert_close(rotated[3, 0, 2], 1.25 * turned)


def test_pool_counts_a_short_prompt_twice_and_whole_granules_of_earlier_chunks() -> None:
    mean_query = torch.arange(1.0, 101.0)[:, None]
    known = torch.ones(100, dtype=torch.bool)
    # One chunk: positions 0..19 and 80..99 exactly.
    exact = (mean_query[:20].sum() + mean_query[80:].sum()) / 40
    torch.testing.assert_close(naive.pool(mean_query, known, 0, 20), exact[None])
    # From position 90 on: 0..31 and 80..89 are earlier, in granules of 16.
    rounded = (mean_query[:32].sum() + mean_query[80:].sum()) / 52
    torch.testing.assert_close(naive.pool(mean_query, known, 90, 20), rounded[None])
    # Without the first tokens: 80..89 as a granule, the rest exactly.
    latest = naive.pool(mean_query, known, 90, 20, pool_prefix=False)
    torch.testing.assert_close(latest, mean_query[80:].mean(dim=0))
    # Shorter than two pools: every token twice.
    torch.testing.assert_close(
        naive.pool(mean_query[:15], known[:15], 0, 20), mean_query[:15].mean(dim=0)
    )
    # What never had a sum does not count.
    known[16:32] = False
    skipped = (mean_query[:16].sum() + mean_query[80:].sum()) / 36
    torch.testing.assert_close(naive.pool(mean_query, known, 90, 20), skipped[None])
