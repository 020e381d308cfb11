"""The benchmarks' head split on the real builder and layers, in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch

from flux_vllm.attention_backend.kernels.paged import KVCache
from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from tests.unit.attention_backend.test_kernels_cases import FULL, SPARSE, Row, Shape, make_batch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here"),
]

SHAPE = Shape(heads=12, kv_heads=4)
BATCHES = {
    "decode": [Row(1, 70, SPARSE, False), Row(1, 97, FULL, False), Row(0, 0)],
    "mixed": [Row(1, 92, SPARSE, False), Row(1, 40, FULL, False), Row(5, 88, SPARSE), Row(5, 56)],
    "short_prefill": [Row(8, 40, SPARSE), Row(1, 90, SPARSE, False)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_batch(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.cuda_backend import stand_for_gpu
    from tests.helpers.head_split import check_head_split

    stand_for_gpu(monkeypatch)
    check_head_split(
        tmp_path_factory.getbasetemp(), make_batch(BATCHES[name], SHAPE, "cpu"), "triton"
    )


def test_odd_number_of_kv_heads_is_refused() -> None:
    from benchmarks.experiments.head_split import halves

    keys = torch.zeros(2, 16, 3, 8)
    call = SimpleNamespace(query=torch.zeros(1, 6, 8), cache=KVCache(keys, keys))
    with pytest.raises(ValueError, match="even number of KV heads, found 3"):
        halves(call)  # type: ignore[arg-type]
