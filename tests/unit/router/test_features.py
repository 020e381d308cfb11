"""What a step pools: the plan's weights against counting token by token.

Oracle: DESIGN.md, section 3, as `tests/helpers/reference_router.pooled_positions` and as a loop
over positions. Pinned: the granule a chunk begins within counts with its earlier part only.
"""

from collections import Counter

import pytest
import torch

from flux_vllm.router.features import (
    GRANULE_TOKENS,
    Picks,
    PoolingPlan,
    PromptSpan,
    physical_granules,
    plan_pooling,
    pooled_ranges,
)
from tests.helpers.reference_router import pooled_positions

GRANULES_PER_ROW = 64


def span_id(span: PromptSpan) -> str:
    return f"{span.computed}+{span.scheduled}of{span.prompt_len}"


class TestPromptSpan:
    @pytest.mark.parametrize(
        ("span", "end"),
        [
            (PromptSpan(0, 10, 10), 10),
            (PromptSpan(0, 10, 25), 10),
            (PromptSpan(20, 5, 25), 25),
            (PromptSpan(16, 20, 25), 25),  # a resumed request recomputes outputs in the same chunk
            (PromptSpan(30, 1, 25), 25),
        ],
        ids=lambda value: span_id(value) if isinstance(value, PromptSpan) else None,
    )
    def test_known_end(self, span: PromptSpan, end: int) -> None:
        assert span.known_end == end


class TestPooledRanges:
    @pytest.mark.parametrize(
        ("span", "pool", "first", "last"),
        [
            (PromptSpan(0, 1, 1), 100, range(0, 1), range(0, 1)),
            (PromptSpan(0, 150, 150), 100, range(0, 100), range(50, 150)),
            (PromptSpan(0, 300, 300), 100, range(0, 100), range(200, 300)),
            (PromptSpan(256, 100, 999), 100, range(0, 100), range(256, 356)),
            (PromptSpan(256, 100, 300), 100, range(0, 100), range(200, 300)),
            (PromptSpan(10, 6, 99), 32, range(0, 16), range(0, 16)),
        ],
        ids=lambda value: span_id(value) if isinstance(value, PromptSpan) else None,
    )
    def test_positions(self, span, pool: int, first: range, last: range) -> None:
        assert pooled_ranges(span, pool) == (first, last)
        assert pooled_ranges(span, pool, pool_prefix=False) == (last,)


def picked(picks: Picks, row: int) -> list[int]:
    assert len(picks.rows) == len(picks.items)
    pairs = zip(picks.rows.tolist(), picks.items.tolist(), strict=True)
    return [item for owner, item in pairs if owner == row]


def planned(span: PromptSpan, row: int, offset: int, plan: PoolingPlan) -> Counter:
    """Count how often each position of a row is pooled; its tokens begin at `offset`."""
    counts = Counter(span.computed + token - offset for token in picked(plan.tokens, row))
    for granule in picked(plan.granules, row):
        owner, index = divmod(granule, GRANULES_PER_ROW)
        assert owner == row
        counts.update(range(index * GRANULE_TOKENS, (index + 1) * GRANULE_TOKENS))
    for granule in picked(plan.straddled, row):
        owner, index = divmod(granule, GRANULES_PER_ROW)
        assert owner == row
        counts.update(range(index * GRANULE_TOKENS, span.computed))
    return counts


SPANS = [
    PromptSpan(computed, scheduled, prompt)
    for computed in (0, 1, 15, 16, 17, 31, 32, 40, 47, 48, 100, 112, 200)
    for scheduled in (1, 15, 16, 17, 60)
    for prompt in {computed + scheduled, computed + scheduled + 7, computed + 1, 230}
    if computed < prompt
]


class TestPlanPooling:
    @pytest.mark.parametrize("pool", [1, 15, 16, 17, 24, 48, 100], ids=lambda p: f"pool{p}")
    @pytest.mark.parametrize("prefix", [True, False], ids=["both-ends", "latest-alone"])
    def test_every_position_counts_as_defined(self, pool: int, prefix: bool) -> None:
        """Each span is planned behind another row, whose 10 tokens come first in the batch."""
        before = PromptSpan(0, 10, 10)
        for span in SPANS:
            plan = plan_pooling([before, span], [0, 10], pool, GRANULES_PER_ROW, prefix)
            everything = torch.ones(span.computed, dtype=torch.bool)
            expected = pooled_positions(
                span.computed,
                span.computed + span.scheduled,
                span.prompt_len,
                pool,
                everything,
                prefix,
            )
            assert planned(span, 1, 10, plan) == Counter(expected), span_id(span)

    def test_rows_share_no_tokens_and_no_granules(self) -> None:
        spans = [PromptSpan(0, 20, 20), PromptSpan(40, 8, 48), PromptSpan(32, 30, 62)]
        plan = plan_pooling(spans, [0, 20, 28], 100, GRANULES_PER_ROW)
        # Shorter than what is pooled at either end: every token counts twice, for its own row.
        assert plan.tokens.items.sort().values.tolist() == [t for t in range(58) for _ in "12"]
        for picks in (plan.tokens, plan.granules):
            owned = [set(picked(picks, row)) for row in range(3)]
            assert sum(map(len, owned)) == len(set().union(*owned))
        assert picked(plan.straddled, 1) == [GRANULES_PER_ROW + 2] * 2
        assert plan.straddled.rows.tolist() == [1, 1]

    def test_no_rows(self) -> None:
        plan = plan_pooling([], [], 16, GRANULES_PER_ROW)
        for picks in (plan.tokens, plan.granules, plan.straddled):
            assert picks.rows.shape == picks.items.shape == (0,)
            assert picks.items.dtype == torch.int64


class TestPhysicalGranules:
    @pytest.mark.parametrize("block_size", [16, 32, 128], ids=lambda b: f"B{b}")
    def test_by_token(self, block_size: int) -> None:
        """A granule's first token lies at the slot that the block table gives its position."""
        table = torch.tensor([[7, 3, 9, 1], [4, 8, 2, 6]], dtype=torch.int32)
        per_row = 4 * block_size // GRANULE_TOKENS
        found = physical_granules(torch.arange(2 * per_row), table, block_size).tolist()
        for row in range(2):
            for index in range(per_row):
                position = index * GRANULE_TOKENS
                block = int(table[row, position // block_size])
                slot = block * block_size + position % block_size
                assert slot % GRANULE_TOKENS == 0
                assert found[row * per_row + index] == slot // GRANULE_TOKENS
