"""The CUDA backend's real builder and layers over whole batches, in Triton's interpreter.

Oracle: `tests.helpers.oracle.naive`, by the rule of test_kernels_cases. On a GPU the same
worker runs larger batches (tests/gpu/test_backend_batches.py).
"""

from collections.abc import Iterable
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from tests.unit.attention_backend.test_kernels_cases import FULL, SPARSE, Row, Shape, make_batch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here"),
]

BATCHES = {
    "decode": [Row(1, 32, SPARSE, False), Row(1, 70, SPARSE, False), Row(1, 97, FULL, False)],
    "drafts": [Row(4, 66, SPARSE, False), Row(2, 90, FULL, False), Row(0, 0)],
    "prefill": [Row(8, 32, SPARSE), Row(8, 90, SPARSE), Row(1, 81, FULL)],
    "mixed": [Row(1, 92, SPARSE, False), Row(1, 40, FULL, False), Row(5, 88, SPARSE), Row(5, 56)],
}


@pytest.fixture(autouse=True)
def _gpu_of_four_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import flash_attn

    for name in ("get_flash_attn_version", "flash_attn_supports_quant_query_input"):
        monkeypatch.setattr(flash_attn, name, lambda *args, **kwargs: 2, raising=False)
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("name", BATCHES)
def test_batch(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.helpers.cuda_backend import BackendWorker

    batch = make_batch(BATCHES[name], Shape(), "cpu")
    worker = BackendWorker(tmp_path_factory.getbasetemp(), batch, "triton")
    for _ in range(2):  # the second step finds the buffers of the first
        worker.check(batch, worker.step(batch))


def _decode_rows(count: int) -> list[Row]:
    return [Row(1, 60 + index, SPARSE, False) for index in range(count)]


DRAFTS = [Row(12, 100, SPARSE, False), Row(12, 70, FULL, False)]


@pytest.mark.parametrize(
    ("kv_heads", "num_sms", "splits"),
    [(2, 6, [16, 4, 1, 4]), (4, 1, [1, 1, 1, 1])],
    ids=["split", "one-share"],
)
def test_all_batches_share_one_workspace_that_is_reserved(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    kv_heads: int,
    num_sms: int,
    splits: list[int],
) -> None:
    """Many rows are split less or not at all, long drafts as far as it holds them."""
    from flux_vllm.attention_backend.cuda import memory, triton_calls
    from tests.helpers.cuda_backend import LAYERS, BackendWorker, engine_config

    properties = SimpleNamespace(multi_processor_count=num_sms)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    shape, folder = Shape(kv_heads=kv_heads), tmp_path_factory.getbasetemp()
    batches = [
        make_batch(rows, shape, "cpu")
        for rows in (_decode_rows(1), _decode_rows(3), _decode_rows(13), DRAFTS)
    ]
    worker = BackendWorker(folder, batches[0], "triton")
    used = []
    for batch in batches:
        with patch.object(triton_calls, "attend_decode", wraps=triton_calls.attend_decode) as spy:
            for layer in worker.layers:
                layer.kv_cache = batch.kv_cache
            worker.check(batch, worker.step(batch))
        used += [call.args[8] for call in spy.call_args_list]
    assert [space.num_splits for space in used[::LAYERS]] == splits
    assert len({(space.out.data_ptr(), space.lse.data_ptr()) for space in used}) == 1
    taken = used[0].out.nbytes + used[0].lse.nbytes
    assert (taken == 0) == (max(splits) == 1)
    config = engine_config(folder, shape)
    groups = [_group(f"layers.{index}" for index in range(LAYERS))]
    stated = memory.fixed_nbytes(worker.runtime, config, groups)
    monkeypatch.setattr(memory, "workspace_nbytes", lambda *_: 0)
    assert stated - memory.fixed_nbytes(worker.runtime, config, groups) == taken


def _group(names: Iterable[str]) -> SimpleNamespace:
    """Stands in for vLLM's KVCacheGroupSpec."""
    return SimpleNamespace(layer_names=list(names), kv_cache_spec=SimpleNamespace(block_size=16))


def test_every_group_has_views_of_its_own(tmp_path_factory, monkeypatch) -> None:
    """vLLM makes a builder a KV cache group, and splits a model's layers into several."""
    from flux_vllm.attention_backend.cuda import memory
    from tests.helpers.cuda_backend import BackendWorker, engine_config

    shape, folder = Shape(), tmp_path_factory.getbasetemp()
    batch = make_batch([Row(1, 40, SPARSE, False)], shape, "cpu")
    worker = BackendWorker(folder, batch, "triton")
    worker.step(batch)
    views = worker.builder._views
    tensors = [tensor for tensor in vars(views).values() if isinstance(tensor, torch.Tensor)]
    held = sum(tensor.nbytes for tensor in tensors) - views._columns.nbytes
    monkeypatch.setattr(memory, "workspace_nbytes", lambda *_: 0)
    config = engine_config(folder, shape)
    one, two = (
        memory.fixed_nbytes(worker.runtime, config, groups)
        for groups in (
            [_group(["layers.0", "layers.1"])],
            [_group(["layers.0"]), _group(["layers.1"])],
        )
    )
    width, rows = views.table.shape[1], views.capacity
    stated_width = 8192 // 16 + 128  # vLLM's table, as wide as it may be
    assert one == held + 8 * rows * (stated_width - width)
    assert one < two < 2 * one


def test_head_dim_without_kernels_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    from flux_vllm.errors import UnsupportedConfigurationError
    from tests.helpers.cuda_backend import BackendWorker

    batch = make_batch([Row(1, 40, SPARSE, False)], Shape(head_dim=192), "cpu")
    worker = BackendWorker(tmp_path_factory.getbasetemp(), batch, "triton")
    with pytest.raises(UnsupportedConfigurationError, match=r"head_dim among .* found 192"):
        worker.step(batch)
