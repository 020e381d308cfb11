"""The CUDA backend's real builder and layers over whole batches, in Triton's interpreter.

Oracle: `tests.helpers.oracle.naive`, by the rule of test_kernels_cases. On a GPU the same
worker runs larger batches (tests/gpu/test_backend_batches.py).
"""

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from tests.unit.attention_backend.test_kernels_cases import (
    FULL,
    SPARSE,
    Row,
    Shape,
    check_rows,
    make_batch,
)

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
    from tests.helpers.cuda_backend import stand_for_gpu

    stand_for_gpu(monkeypatch)


@pytest.mark.parametrize(
    "shape",
    [Shape(), Shape(learned_sinks=True), Shape(dtype=torch.bfloat16, float8=True)],
    ids=str,
)
@pytest.mark.parametrize("name", BATCHES)
def test_batch(name: str, shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.helpers.cuda_backend import BackendWorker

    batch = make_batch(BATCHES[name], shape, "cpu")
    worker = BackendWorker(tmp_path_factory.getbasetemp(), batch, "triton")
    for _ in range(2):  # the second step finds the buffers of the first
        worker.check(batch, worker.step(batch))


@pytest.mark.parametrize("by_layer", [False, True], ids=["here", "by-the-layer"])
def test_vllms_own_call_over_a_float8_cache_gets_float8_queries(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, by_layer: bool
) -> None:
    """Quantized by the layer's scale once: under policy `full` vLLM's layer has done it."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from tests.helpers.cuda_backend import BackendWorker

    shape = Shape(dtype=torch.bfloat16, float8=True)
    batch = make_batch(BATCHES["decode"], shape, "cpu")
    worker = BackendWorker(tmp_path_factory.getbasetemp(), batch, "triton")
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        FlashAttentionImpl, "forward", lambda self, layer, query, *_: seen.append(query)
    )
    outputs = [batch.poisoned_output() for _ in worker.layers]
    assert batch.float8 is not None
    asked = replace(batch, query=batch.float8.query) if by_layer else batch
    worker.forward(asked, SimpleNamespace(flux=None), outputs)
    for query in seen:
        assert query.dtype == torch.float8_e4m3fn
        assert torch.equal(query.float(), batch.float8.query.float())
    assert len(seen) == len(worker.layers)


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
    from tests.helpers.cuda_backend import LAYERS, BackendWorker, engine_config, stand_for_gpu

    stand_for_gpu(monkeypatch, num_sms)
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
        used += [call.args[4] for call in spy.call_args_list]
    assert [space.num_splits for space in used[::LAYERS]] == splits
    assert len({(space.out.data_ptr(), space.lse.data_ptr()) for space in used}) == 1
    taken = used[0].out.nbytes + used[0].lse.nbytes
    assert (taken == 0) == (max(splits) == 1)
    config = engine_config(folder, shape)
    groups = [_group(f"layers.{index}" for index in range(LAYERS))]
    stated = memory.fixed_nbytes(worker.runtime, config, groups)
    monkeypatch.setattr(memory, "workspace_nbytes", lambda *_: 0)
    assert stated - memory.fixed_nbytes(worker.runtime, config, groups) == taken


def test_a_decode_step_takes_nothing_of_the_host(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views are written once a step, by its first layer; routes come when rows change, and then
    only. Building launches nothing and copies nothing: what is noted are our launches and copies.
    """
    from flux_vllm.attention_backend.cuda import views
    from tests.helpers.cuda_backend import BackendWorker

    batch = make_batch(BATCHES["decode"], Shape(), "cpu")
    worker = BackendWorker(tmp_path_factory.getbasetemp(), batch, "triton")
    noted: list[str] = []
    for name in ("write_views", "upload", "to_device"):
        original = getattr(views, name)

        def note(*args: object, name=name, original=original, **kwargs: object) -> object:
            noted.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(views, name, note)
    worker.begin_step(batch.rows)
    rows = worker.runtime.current.batch
    outputs = [batch.poisoned_output() for _ in worker.layers]
    expected = [["upload", "to_device"], [], [], ["to_device"]]  # tables are laid out once
    for step, built in enumerate(expected):
        if step == 3:  # routed anew
            worker.runtime.table.version += 1
        worker.runtime.begin_step(rows)
        metadata = worker.metadata(batch)
        assert sorted(noted) == sorted(built), step
        noted.clear()
        worker.forward(batch, metadata, outputs)
        worker.check(batch, outputs)
        assert noted == ["write_views"]
        noted.clear()
        worker.runtime.end_step()


@pytest.mark.parametrize("name", ["drafts", "mixed"])
def test_groups_share_one_launch(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two KV cache groups of a layer each: blocks of their own, one launch of views for both."""
    from flux_vllm.attention_backend.cuda import views
    from flux_vllm.attention_backend.cuda.backend import FluxCUDABackend
    from tests.helpers.cuda_backend import BackendWorker, engine_config

    folder, shape = tmp_path_factory.getbasetemp(), Shape()
    batches = [make_batch(BATCHES[name], shape, "cpu", seed=seed) for seed in (0, 1)]
    assert not torch.equal(batches[0].block_table, batches[1].block_table)
    worker = BackendWorker(folder, batches[0], "triton")
    builder, config = worker.builder, engine_config(folder, shape)
    builders = [
        FluxCUDABackend.get_builder_cls()(
            builder.kv_cache_spec, [f"layers.{group}"], config, builder.device
        )
        for group in (0, 1)
    ]
    assert builders[0]._group.views is builders[1]._group.views
    assert builders[0]._group.views is not builder._group.views
    launched: list[int] = []
    write = views.write_views

    def note(tables: object, *args: object, **kwargs: object) -> None:
        launched.append(tables.layout.shape[0])
        write(tables, *args, **kwargs)

    monkeypatch.setattr(views, "write_views", note)
    for _ in range(2):
        worker.begin_step(batches[0].rows)
        steps = []
        for worker.builder, batch in zip(builders, batches, strict=True):
            steps.append(worker.metadata(batch))
        outputs = [batch.poisoned_output() for batch in batches]
        for layer, batch, metadata, out in zip(worker.layers, batches, steps, outputs, strict=True):
            layer.impl.forward(layer, batch.query, None, None, batch.kv_cache, metadata, out)
        for index, batch in enumerate(batches):
            rows = [replace(row, route=row.route ^ (index % 2)) for row in batch.rows]
            routed = replace(batch, rows=rows)
            check_rows(routed, outputs[index], [True] * len(rows))
        worker.runtime.end_step()
    assert launched == [2, 2]


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
    group = worker.builder._group
    views = group.views
    tensors = [tensor for tensor in vars(views).values() if isinstance(tensor, torch.Tensor)]
    held = sum(tensor.nbytes for tensor in (*tensors, *views.layer_views, group.table))
    monkeypatch.setattr(memory, "workspace_nbytes", lambda *_: 0)
    config = engine_config(folder, shape)
    one, two = (
        memory.fixed_nbytes(worker.runtime, config, groups)
        for groups in (
            [_group(["layers.0", "layers.1"])],
            [_group(["layers.0"]), _group(["layers.1"])],
        )
    )
    width, rows = group.table.shape[1], views.capacity
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
