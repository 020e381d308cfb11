"""Tensor parallel 2 on the CPU: each rank has half of the heads, and decides by all of them.

Oracle: the engine of one rank, and tests/helpers/reference.py, in float32. tests/gpu has the same
for CUDA graphs, asynchronous scheduling and bfloat16.
"""

import pytest

from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Answer
from tests.helpers.models import random_prompt, write_random_router
from tests.helpers.reference import ReferenceRouter, SparsePattern
from tests.helpers.replay import LOGPROB_TOLERANCE, assert_same, replay
from tests.helpers.side_by_side import Setup, serve
from tests.helpers.tensor_parallel import (
    assert_ranks_alike,
    compare_routes,
    logprob_difference,
)

pytestmark = pytest.mark.vllm

LENGTHS = [1, 15, 16, 17, 159, 160, 161, 320, 500, 900]
BLOCK_SIZE = 32
OUTPUT = 6
ARGUMENTS = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 256}


def test_two_ranks(tiny_model, reference, reference_router):
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    setups = [Setup(tiny_model, {}, ranks, ARGUMENTS) for ranks in (1, 2)]
    served = [serve(setup, prompts, OUTPUT) for setup in setups]
    assert [each.unrouted for each in served] == [0, 0]
    one, two = (each.answers for each in served)
    logs = served[1].logs
    assert len(logs) == 2
    print("\n" + assert_ranks_alike(logs))
    found = compare_routes(one, two)
    print(found)
    routed = [answer for answer in two if answer.routes is not None]
    assert len(routed) >= 5
    assert found.compared > 0.8 * len(routed) * 4
    assert len({tuple(answer.routes) for answer in routed}) > 2
    prompt, output, tokens = logprob_difference(one, two, found.parted)
    print(f"log-probabilities: prompt {prompt:.1e}, output {output:.1e} of {tokens} tokens")
    assert tokens > 0.8 * OUTPUT * len(LENGTHS)
    assert max(prompt, output) < LOGPROB_TOLERANCE
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
    for answer in two:
        assert_same(answer, replay(reference, answer, pattern, router=reference_router))


@pytest.mark.long
def test_ranks_leave_a_probe_at_the_same_layer(tiny_model, reference, tmp_path):
    """Layer 1 is all that this router reads: the sums of its output and of later ones are left."""
    path = write_random_router(
        tmp_path,
        num_layers=4,
        head_dim=32,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=tiny_model,
        pools=("tail:16", "head:32"),
        context_layers=(1,),
        own_weight=0,
    )
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    served = serve(Setup(tiny_model, {"router": str(path)}, 2, ARGUMENTS), prompts, OUTPUT)
    print("\n" + assert_ranks_alike(served.logs))
    assert served.unrouted == 0
    routed = [answer for answer in served.answers if answer.routes is not None]
    assert len({tuple(answer.routes) for answer in routed}) > 2
    pattern, router = (
        SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE),
        ReferenceRouter.load(path),
    )
    for answer in served.answers:
        assert_same(answer, replay(reference, answer, pattern, router=router))


def _decided(*p_full):
    routes = [int(p >= 0.5) for p in p_full]
    return Answer([], [], [], [], [], 0, routes=routes, p_full=list(p_full))


def test_comparison_refuses_a_clear_difference():
    with pytest.raises(AssertionError, match="prompt 0, layer 1"):
        compare_routes([_decided(0.9, 0.52)], [_decided(0.9, 0.48)])


def test_comparison_passes_over_a_near_tie():
    found = compare_routes([_decided(0.9, 0.501, 0.2)], [_decided(0.8, 0.499, 0.2)])
    assert (found.compared, found.near, found.parted) == (2, 1, {0})
