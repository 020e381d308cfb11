"""The CUDA backend over block tables whose SPARSE rows gave back what `free_kv` frees.

Oracle: `tests.helpers.oracle.naive` over the same batch with every block there. What was given back
is NaN here, which no masked key would survive: it must not be loaded at all. Tiles decide what is
loaded beside what is attended, so the interpreter runs Hopper's too.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from flux_vllm.attention_backend.kernels import fa3, triton_decode, triton_prefill
from tests.unit.attention_backend.test_kernels_cases import (
    DEVICES,
    FULL,
    SPARSE,
    PagedBatch,
    Row,
    Shape,
    assert_as_exact_as_torch,
    make_batch,
)

pytestmark = pytest.mark.vllm

BATCHES = {
    "decode": [Row(1, 420, SPARSE, False), Row(1, 97, FULL, False), Row(1, 333, SPARSE, False)],
    "drafts": [Row(4, 480, SPARSE, False), Row(2, 90, FULL, False), Row(0, 0)],
    "prefill": [Row(40, 516, SPARSE), Row(9, 396, SPARSE), Row(3, 81, FULL)],
    "mixed": [Row(1, 380, SPARSE, False), Row(1, 40, FULL, False), Row(21, 484, SPARSE)],
}


CALLS = [
    *(pytest.param(*device.values, "triton", marks=device.marks) for device in DEVICES),
    pytest.param(
        "cuda",
        "fa3",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not fa3.is_available(), reason="needs a Hopper GPU and vLLM's FA3"),
        ],
    ),
]
"""Devices and the kernels that they run."""
SHAPES = [
    Shape(),
    # A tile of 64 keys holds sinks and, behind them, what was given back.
    Shape(sink_tokens=16, window_tokens=70, head_dim=128, dtype=torch.bfloat16),
    Shape(dtype=torch.bfloat16, float8=True),
    Shape(head_dim=128, dtype=torch.bfloat16, float8=True),
]


@pytest.fixture(autouse=True)
def _gpu_of_four_multiprocessors(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from tests.helpers.cuda_backend import stand_for_gpu

    if device == "cpu":
        stand_for_gpu(monkeypatch)


def _as_on_hopper(module: ModuleType, choose: Callable[..., Any]) -> Callable[..., Any]:
    """Let a module choose its sizes as it does on a GPU, and nothing else."""

    def chosen(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "INTERPRETED", False)
            patch.setattr(module, "is_hopper", lambda: True, raising=False)
            return choose(*args)

    return chosen


def _take_hoppers_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((triton_prefill, "default_tile"), (triton_decode, "default_block_n")):
        monkeypatch.setattr(module, name, _as_on_hopper(module, getattr(module, name)))


def _free(batch: PagedBatch, too_many: int = 0) -> tuple[PagedBatch, int]:
    """Let SPARSE rows give back what they may. Returns: the batch, and how many blocks went."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from flux_vllm.kv.spec import FluxSpec

    shape, table, count = batch.shape, batch.block_table.clone(), 0
    spec = FluxSpec.of(
        FullAttentionSpec(
            block_size=shape.block_size,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_dim,
            dtype=torch.uint8 if shape.float8 else shape.dtype,
        ),
        cluster=0,
        sink_tokens=shape.sink_tokens,
        window_tokens=shape.window_tokens,
        is_local=True,
    )
    for index, row in enumerate(batch.rows):
        if row.route == SPARSE and row.query_len:
            end = spec.freed_end(row.seq_len - row.query_len) + too_many
            table[index, spec.sink_blocks : end] = 0  # NaN throughout
            count += max(end - spec.sink_blocks, 0)
    return replace(batch, block_table=table), count


def _run(batch: PagedBatch, freed: PagedBatch, folder, kernels: str) -> None:
    """Hold the first layer, whose routes are the rows' own, to the batch with every block."""
    from tests.helpers.cuda_backend import BackendWorker

    out = BackendWorker(folder, freed, kernels).step(freed)[0]
    exact, low = batch.oracle(), batch.oracle(batch.shape.dtype)
    for index, row in enumerate(batch.rows):
        if row.query_len:
            part = batch.tokens_of(index)
            what = f"row {index} {row}"
            assert_as_exact_as_torch(out[part], exact[part], low[part], what, batch.rounding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("device", "kernels"), CALLS)
@pytest.mark.parametrize("name", BATCHES)
def test_freed_blocks_are_not_read(
    device: str, name: str, kernels: str, shape: Shape, tmp_path_factory
) -> None:
    batch = make_batch(BATCHES[name], shape, device)
    batch.by_fa3 = kernels == "fa3"
    freed, count = _free(batch)
    assert count > 10
    _run(batch, freed, tmp_path_factory.getbasetemp(), kernels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", DEVICES[:1])
@pytest.mark.parametrize("name", BATCHES)
def test_freed_blocks_are_not_read_with_hoppers_tiles(
    device: str, name: str, shape: Shape, tmp_path_factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _take_hoppers_tiles(monkeypatch)
    batch = make_batch(BATCHES[name], shape, device)
    freed, count = _free(batch)
    assert count > 10
    _run(batch, freed, tmp_path_factory.getbasetemp(), "triton")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_a_window_freed_too_early_is_noticed(device: str, name: str, tmp_path_factory) -> None:
    batch = make_batch(BATCHES[name], Shape(), device)
    freed, _ = _free(batch, too_many=128 // 16 + 1)
    with pytest.raises(AssertionError, match="not finite"):
        _run(batch, freed, tmp_path_factory.getbasetemp(), "triton")
