"""The CUDA backend under the other sparse patterns: whole batches through builder and layers.

Oracle: each pattern's own definition, `SparsePattern.visible`, attended to by naive.py; the bound
is that of test_kernels_cases. The definitions are held to masks written apart from them in
test_patterns.py.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.pattern import make_pattern
from tests.unit.attention_backend.test_kernels_cases import (
    DEVICES,
    FULL,
    SPARSE,
    Row,
    Shape,
    make_batch,
)

pytestmark = pytest.mark.vllm

TRIANGLE = {"sparse_pattern": "triangle", "pattern_options": {"tail_tokens": 11}}
# Chunks before the tail, that reach into it, within it, of one token; resumed past the prompt.
TRIANGLE_ROWS = {
    "prefill": [
        Row(30, 90, SPARSE),
        Row(30, 90, SPARSE, prompt_len=200),
        Row(30, 90, SPARSE, prompt_len=95),
        Row(5, 80, SPARSE, prompt_len=80),
        Row(1, 70, SPARSE, prompt_len=81),
        Row(1, 70, SPARSE, prompt_len=80),
        Row(25, 75, SPARSE, prompt_len=60),
        Row(12, 60, FULL, prompt_len=60),
        Row(40, 40, SPARSE),
    ],
    "mixed": [
        Row(1, 92, SPARSE, False),
        Row(1, 40, FULL, False),
        Row(30, 88, SPARSE),
        Row(17, 56),
        Row(0, 0),
    ],
}


@pytest.fixture(autouse=True)
def _gpu_of_four_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter stand for a GPU without FlashAttention-3."""
    if not triton.knobs.runtime.interpret:
        return
    from vllm.v1.attention.backends import flash_attn

    for name in ("get_flash_attn_version", "flash_attn_supports_quant_query_input"):
        monkeypatch.setattr(flash_attn, name, lambda *args, **kwargs: 2, raising=False)
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def check(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Row],
    shape: Shape,
    device: str,
    pattern: dict[str, Any],
    kernels: str = "triton",
) -> None:
    from tests.helpers.cuda_backend import BackendWorker

    batch = make_batch(rows, shape, device)
    sizes = (shape.sink_tokens, shape.window_tokens)
    batch.pattern = make_pattern(pattern["sparse_pattern"], *sizes, pattern["pattern_options"])
    worker = BackendWorker(tmp_path_factory.getbasetemp(), batch, kernels, **pattern)
    for _ in range(2):  # the second step finds the buffers of the first
        worker.check(batch, worker.step(batch))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRIANGLE_ROWS)
def test_triangle(name: str, device: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(tmp_path_factory, TRIANGLE_ROWS[name], Shape(), device, TRIANGLE)


@pytest.mark.gpu
@pytest.mark.skipif(not fa3.is_available(), reason="needs a Hopper GPU and FA3")
@pytest.mark.parametrize("name", TRIANGLE_ROWS)
def test_triangle_with_fa3(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(tmp_path_factory, TRIANGLE_ROWS[name], Shape(), "cuda", TRIANGLE, "fa3")
