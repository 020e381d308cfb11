"""The warm-up over the real builder and layers, in Triton's interpreter.

Oracle: the batches that the kernels ask for, noted where layers call them. Afterwards the worker is
as it was: no request, no count, no batch.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from flux_vllm.router.route import Route
from flux_vllm.routing.decode_counts import DecodeKeys
from tests.unit.attention_backend.test_kernels_cases import SPARSE, Row, Shape, make_batch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here"),
]


class _WrittenProbe:
    """Stands in for PromptProbe: each layer the other route."""

    def decide(self, prompt: Any) -> None:
        assert len(prompt.tokens) == prompt.length
        self.routes = torch.tensor([int(Route.SPARSE), int(Route.FULL)], dtype=torch.int8)
        self.full_probability = self.routes.float()


@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
def test_every_variant_is_called(
    pattern: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from flux_vllm.attention_backend.cuda import triton_calls
    from tests.helpers.cuda_backend import BackendWorker, stand_for_gpu

    stand_for_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    batch = make_batch([Row(1, 40, SPARSE, False)], Shape(), "cpu")
    worker = BackendWorker(tmp_path_factory.getbasetemp(), batch, "triton", sparse_pattern=pattern)
    runtime = worker.runtime
    runtime.probe = _WrittenProbe()  # type: ignore[assignment]
    runtime.is_warming_up = True
    group = SimpleNamespace(get_metadata_builder=lambda ubatch: worker.builder)
    tables = SimpleNamespace(input_block_tables=[torch.zeros(64, 512, dtype=torch.int32)])
    runner = SimpleNamespace(attn_groups=[[group]], block_tables=tables)
    scheduler = SimpleNamespace(max_num_seqs=64, max_num_batched_tokens=150)
    worker.builder.vllm_config = SimpleNamespace(
        scheduler_config=scheduler,
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
        model_config=SimpleNamespace(max_model_len=100, dtype=batch.query.dtype),
    )
    decoded: list[tuple[int, int]] = []
    passes: list[tuple[int, bool]] = []

    def decode(query: torch.Tensor, *args: Any, max_query_len: int, **kwargs: Any) -> None:
        workspace = next(arg for arg in args if hasattr(arg, "num_splits"))
        decoded.append((workspace.num_splits, max_query_len))

    def prefill(query: torch.Tensor, *args: Any, sparse: bool, **kwargs: Any) -> None:
        passes.append((len(query), sparse))

    monkeypatch.setattr(triton_calls, "attend_decode", decode)
    monkeypatch.setattr(triton_calls, "attend_prefill", prefill)
    runtime.warm_up(runner)
    kernels = worker.layers[0].impl.kernels
    from flux_vllm.attention_backend.cuda.calls import Limits

    variants = kernels.variants(Limits(64, 64, 150, 1))
    assert len(decoded) == len(set(decoded)) == len(variants.decode) > 1
    sparse = [tokens for tokens, is_sparse in passes if is_sparse]
    assert sparse == variants.prefill
    assert len(passes) == (3 if pattern == "triangle" else 2) * len(sparse)
    assert runtime.status()["live_requests"] == 0
    assert runtime.current is None
    assert runtime.decode_counts.read() == DecodeKeys(0, 0, 0)
    assert runtime.status()["recent"] == []
