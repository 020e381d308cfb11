"""A tiny gpt-oss on a GPU: learned sinks in layers of full attention and of a sliding window.

Oracle: transformers' own code of it in float32 (tests/helpers/families.py), over the same bfloat16
weights: at most twice the r.m.s. error that stock vLLM makes. The kernels themselves are held to
their oracle at gpt-oss's shape in test_backend_batches.py and in tests/unit/attention_backend.
"""

from dataclasses import replace

import pytest

from tests.e2e.test_layer_kinds import FAMILIES
from tests.helpers.families import STATIC, Case, answer_all, check_router, make_case, start
from tests.helpers.reference import FULL, SPARSE

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

FAMILY = replace(
    FAMILIES["gpt-oss"], dtype="bfloat16", head_dim=64, arguments={"enforce_eager": False}
)
KERNELS = ["fa3", "triton"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(FAMILY, tmp_path_factory.mktemp("gpt-oss"))


@pytest.mark.parametrize("kernels", KERNELS)
def test_fixed_routes(case: Case, kernels: str) -> None:
    """In one chunk, in chunks and on a prefix hit; decode by CUDA graphs."""
    sparse = STATIC | {"sparse_layers": list(FAMILY.sparse), "kernels": kernels}
    with start(case.folder, FAMILY, sparse) as engine:
        answers = list(answer_all(engine, FAMILY))
    routes = [[SPARSE if n in FAMILY.sparse else FULL for n in range(4)]] * len(answers)
    assert case.error(answers, routes) < case.allowed
    assert max(answer.cached_tokens for answer in answers) > 0


@pytest.mark.parametrize("kernels", KERNELS)
def test_router(case: Case, kernels: str) -> None:
    """By a probe that attends with the sinks, captured as a CUDA graph."""
    check_router(case, kernels)
