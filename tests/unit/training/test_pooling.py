"""Oracle: plans written down by hand."""

import torch

from training.pooling import plan_chunks


def test_plan_chunks_assigns_tokens_and_marks_padding() -> None:
    plan = plan_chunks([[4, 9], [6]], 12, 16)
    assert plan.chunk_of_token.tolist() == [[0] * 4 + [1] * 8, [0] * 12]
    assert plan.is_last.tolist() == [[False, True], [True, False]]
    assert plan.is_early.tolist() == [[True, False], [False, False]]
    torch.testing.assert_close(plan.pool_weights.sum(dim=-1), torch.ones(2, 2))


def test_plan_chunks_marks_the_prompts_last_queries_whatever_the_chunks() -> None:
    plan = plan_chunks([[4, 9], [6], [2]], 12, 16, tail_tokens=3)
    marked = [row.nonzero()[:, 0].tolist() for row in plan.is_tail]
    assert marked == [[6, 7, 8], [3, 4, 5], [0, 1]]
    assert not plan_chunks([[4, 9]], 12, 16).is_tail.any()


def test_plan_chunks_can_leave_the_prefix_out() -> None:
    plan = plan_chunks([[100]], 100, 16, pool_prefix=False)
    assert plan.pool_weights[0, 0].nonzero()[:, 0].tolist() == list(range(84, 100))
