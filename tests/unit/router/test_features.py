"""What a step pools: the plan's weights against counting token by token.

Oracle: DESIGN.md, section 3, as `tests/helpers/reference_router.pooled_positions` and as a loop
over positions. Pinned: the granule a chunk begins within counts with its earlier part only.
"""

from collections import Counter

import pytest
import torch

from flux_vllm.router.features import (
    GRANULE_TOKENS,
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


def planned(span: PromptSpan, row: int, offset: int, plan: PoolingPlan) -> Counter:
    """Count how often each position of a row is pooled; its tokens begin at `offset`."""
    counts: Counter = Counter()
    for token, weight in enumerate(plan.step_weights[row].tolist()):
        if weight:
            counts[span.computed + token - offset] += int(weight)
    for granule, weight in zip(
        plan.granules.tolist(), plan.granule_weights[row].tolist(), strict=True
    ):
        if weight:
            owner, index = divmod(granule, GRANULES_PER_ROW)
            assert owner == row
            for position in range(index * GRANULE_TOKENS, (index + 1) * GRANULE_TOKENS):
                counts[position] += int(weight)
    if plan.straddled[row] >= 0:
        owner, index = divmod(int(plan.straddled[row]), GRANULES_PER_ROW)
        assert owner == row
        for position in range(index * GRANULE_TOKENS, span.computed):
            counts[position] += int(plan.straddle_weights[row])
    else:
        assert plan.straddle_weights[row] == 0
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
    def test_every_position_counts_as_defined(self, pool: int) -> None:
        """Each span is planned behind another row, whose 10 tokens come first in the batch."""
        before = PromptSpan(0, 10, 10)
        for span in SPANS:
            tokens = span.known_end - span.computed
            plan = plan_pooling([before, span], [0, 10], 10 + tokens, pool, GRANULES_PER_ROW)
            everything = torch.ones(span.computed, dtype=torch.bool)
            expected = pooled_positions(
                span.computed,
                span.computed + span.scheduled,
                span.prompt_len,
                pool,
                everything,
            )
            assert planned(span, 1, 10, plan) == Counter(expected), span_id(span)

    def test_rows_share_no_tokens_and_no_granules(self) -> None:
        spans = [PromptSpan(0, 20, 20), PromptSpan(40, 8, 48), PromptSpan(32, 30, 62)]
        plan = plan_pooling(spans, [0, 20, 28], 58, 100, GRANULES_PER_ROW)
        assert (plan.step_weights != 0).sum(dim=0).tolist() == [1] * 58
        assert (plan.granule_weights != 0).sum(dim=0).tolist() == [1] * len(plan.granules)
        assert plan.straddled.tolist() == [-1, GRANULES_PER_ROW + 2, -1]

    def test_no_rows(self) -> None:
        plan = plan_pooling([], [], 33, 16, GRANULES_PER_ROW)
        assert plan.step_weights.shape == (0, 33)
        assert plan.granule_weights.shape == (0, 0)
        assert plan.granules.shape == plan.straddled.shape == (0,)


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

    def test_absent_is_the_null_blocks(self) -> None:
        table = torch.tensor([[1_000_000]], dtype=torch.int32)
        assert physical_granules(torch.tensor([-1]), table, 32).tolist() == [0]
