"""The benchmarks' head split on a GPU: right heads, right keys.

Oracle: see tests/helpers/head_split.py.
"""

import pytest
import torch

from flux_vllm.attention_backend.kernels import fa3
from tests.unit.attention_backend.test_kernels_cases import FULL, SPARSE, Row, Shape, make_batch

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

KERNELS = [
    pytest.param(
        "fa3",
        marks=pytest.mark.skipif(not fa3.is_available(), reason="needs a Hopper GPU and FA3"),
    ),
    "triton",
]
SHAPE = Shape(
    heads=16,
    kv_heads=4,
    head_dim=128,
    dtype=torch.bfloat16,
    sink_tokens=40,
    window_tokens=200,
)
BATCHES = {
    "decode": [Row(1, n, i % 2, False) for i, n in enumerate((2000, 1999, 300, 161, 1))],
    "prefill": [Row(64, 1024, SPARSE), Row(40, 200, SPARSE), Row(3, 700, FULL)],
    "mixed": [Row(1, 900, SPARSE, False), Row(1, 40, FULL, False), Row(77, 880, SPARSE)],
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", BATCHES)
def test_head_split(name, kernels, tmp_path_factory):
    from tests.helpers.head_split import check_head_split

    batch = make_batch(BATCHES[name], SHAPE, "cuda")
    check_head_split(tmp_path_factory.getbasetemp(), batch, kernels)
