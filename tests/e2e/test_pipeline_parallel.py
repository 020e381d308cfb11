"""Pipeline parallel 2 on the CPU: each stage has half of the layers and knows all routes.

Oracle: the engine of one stage, and tests/helpers/reference.py, in float32. Pinned: stages probe
together, a layer's router sees layers of a later stage, and a request is counted once.
"""

import pytest

from flux_vllm.router.place import beside_weights
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.models import random_prompt, write_random_router, write_tiny_llama
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import assert_same, replay
from tests.helpers.side_by_side import Setup, serve_side_by_side
from tests.helpers.tensor_parallel import assert_ranks_alike, compare_routes

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.long]

LENGTHS = [1, 17, 159, 160, 161, 320, 500, 900]
BLOCK_SIZE = 32
OUTPUT = 6
ARGUMENTS = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 256}
STAGES = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
PATTERN = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
ROUTES = [SPARSE, FULL, FULL, SPARSE]
STATIC = {
    "policy": "static",
    "sparse_layers": [0, 3],
    "sink_tokens": SINK_TOKENS,
    "window_tokens": WINDOW_TOKENS,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama whose routers all look at the queries of a layer on the second stage."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("llama"))
    write_random_router(
        beside_weights(folder).parent,
        num_layers=4,
        head_dim=32,
        pools=["tail:16", "ends:64"],
        context_layers=[2],
        widths=[64, 32, 32, 32],
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=folder,
    )
    return folder


@pytest.mark.parametrize(
    "flux",
    [pytest.param(STATIC, marks=pytest.mark.long, id="static"), pytest.param({}, id="router")],
)
def test_two_stages(model, flux):
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    setups = [Setup(model, flux, 1, ARGUMENTS | extra) for extra in ({}, STAGES)]
    served = serve_side_by_side(setups, prompts, OUTPUT)
    assert [each.unrouted for each in served] == [0, 0]
    one, two = (each.answers for each in served)
    print("\n" + assert_ranks_alike(served[1].logs))
    assert len(served[1].logs) == 2
    if not flux:
        found = compare_routes(one, two)
        assert found.compared > 10
        assert len({tuple(answer.routes) for answer in two if answer.routes is not None}) > 2
    assert served[0].decisions == served[1].decisions
    reference, router = ReferenceModel(model), ReferenceRouter.load(beside_weights(model))
    for answer in two:
        fixed = {"routes": ROUTES} if flux else {"router": router}
        assert_same(answer, replay(reference, answer, PATTERN, **fixed))
