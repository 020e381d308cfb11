"""Oracle: the server's own route state, fed chunk by chunk."""

import numpy as np
import pytest
import torch

from flux_vllm.router.features import PromptSpan
from flux_vllm.router.state import QuerySums
from training.pooling import plan_chunks, pool


def server_features(
    mean_query: torch.Tensor, ends: list[int], pool_tokens: int, pool_prefix: bool
) -> list[torch.Tensor]:
    """Pool one prompt as the server does: [T, H] and chunk ends to one [H] a chunk."""
    blocks = -(-len(mean_query) // 16)
    sums = QuerySums(1, blocks + 1, 16, mean_query.shape[1], torch.device("cpu"))
    sums.sums = sums.sums.float()  # the stored sums' rounding is not what is compared
    table = torch.arange(1, blocks + 1, dtype=torch.int32)[None]
    found, start = [], 0
    for end in ends:
        positions = torch.arange(start, end)
        slots = table[0].long()[positions // 16] * 16 + positions % 16
        span = PromptSpan(computed=start, scheduled=end - start, prompt_len=ends[-1])
        routed, slot = np.array([True]), np.array([0])
        step = sums.begin_step([span], routed, slot, slots, table, pool_tokens, pool_prefix)
        found.append(sums.update_and_pool(0, step, mean_query[start:end])[0])
        start = end
    return found


@pytest.mark.parametrize("pool_tokens", [16, 32, 24], ids=lambda n: f"pool{n}")
@pytest.mark.parametrize(
    "ends",
    [[40], [200], [64, 200], [50, 70, 199], [7, 8, 200], [100, 101, 102], [16, 33]],
    ids=lambda ends: "-".join(map(str, ends)),
)
@pytest.mark.parametrize("pool_prefix", [True, False], ids=["both-ends", "latest-alone"])
def test_plan_chunks_pools_as_the_server_does(
    ends: list[int], pool_tokens: int, pool_prefix: bool
) -> None:
    mean_query = torch.randn(ends[-1], 8)
    expected = server_features(mean_query, ends, pool_tokens, pool_prefix)
    plan = plan_chunks([ends], ends[-1] + 9, pool_tokens, pool_prefix)
    padded = torch.cat([mean_query, torch.full((9, 8), 1e6)])[None]
    torch.testing.assert_close(pool(padded, plan)[0], torch.stack(expected), rtol=1e-4, atol=1e-4)


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
