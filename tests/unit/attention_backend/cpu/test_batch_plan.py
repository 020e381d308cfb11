"""One batch on the CPU backend: rows of all phases and routes through vLLM's own kernels.

Oracle: tests/helpers/reference_attention.py, each row alone in float32, with the exact pattern in
prefill and edges widened to blocks in decode. Blocks that no row may read are NaN: foreign ones,
those named in stale table tails, and those that a decode's compacted row skips. Pinned: a one-token
prompt tail is prefill, a row without a route attends FULL, layers with equal routes share a plan.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_vllm.attention_backend.cpu.batch_plan import CpuRoutes
from flux_vllm.attention_backend.cpu.pages import learn_page_layout
from flux_vllm.attention_backend.layer import LayerBinding
from flux_vllm.config import FluxConfig
from flux_vllm.routing.probe import ProbeMetadata
from flux_vllm.routing.runtime import FluxRuntime
from tests.helpers.reference_attention import SparsePattern, masked_attention
from tests.unit.attention_backend.cpu.cpu_batch import (
    ALL_SPARSE,
    BLOCK,
    FULL,
    LAYERS,
    SPARSE,
    CpuBatch,
    H,
    K,
    N,
    Row,
    S,
    W,
)

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
ATOL = 2e-5  # float32, another order of additions


SPARSE_LAST = (FULL, FULL, SPARSE)
SPARSE_FIRST = (SPARSE, FULL, FULL)
BATCHES = {
    "mixed": [
        Row(0, 200, 200, SPARSE_LAST),
        Row(300, 1, 250, ALL_SPARSE),
        Row(128, 150, 500, SPARSE_FIRST),
        Row(400, 1, 400, (FULL, SPARSE, FULL)),
        Row(256, 1, 257, ALL_SPARSE),  # a one-token prompt tail
        Row(180, 1, 100),  # without a route
        Row(5, 1, 5, ALL_SPARSE),  # shorter than sinks and window
        Row(0, 60, 60, ALL_SPARSE),
    ],
    "all-sparse-prefill": [Row(0, 150, 150, ALL_SPARSE), Row(97, 97, 300, ALL_SPARSE)],
    "all-sparse-decode": [Row(n, 1, 100, ALL_SPARSE) for n in (109, 110, 111, 127, 128, 300)],
    "all-full": [Row(0, 150, 150, (FULL,) * 3), Row(200, 1, 200, (FULL,) * 3)],
    "speculative-decode": [Row(300, 4, 250, ALL_SPARSE), Row(170, 3, 100, SPARSE_FIRST)],
    "recomputed-outputs": [Row(0, 260, 150, ALL_SPARSE), Row(120, 1, 100, ALL_SPARSE)],
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fixed_runtime() -> FluxRuntime:
    return FluxRuntime(
        FluxConfig(policy="static", sparse_layers=(0,), sink_tokens=S, window_tokens=W),
        None,
        num_layers=LAYERS,
        routed_layers=tuple(range(LAYERS)),
        max_requests=4,
        device=CPU,
    )


@pytest.fixture(scope="module")
def make_impl() -> Callable[..., Any]:
    """Make the real implementation object, as `Attention` does."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from flux_vllm.attention_backend.cpu.backend import FluxCPUImpl

    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.float32)

    def make(**options: Any) -> Any:
        defaults = {
            "num_heads": N,
            "head_size": H,
            "scale": 0.3,
            "num_kv_heads": K,
            "alibi_slopes": None,
            "sliding_window": None,
            "kv_cache_dtype": "auto",
        }
        with set_current_vllm_config(config):
            return FluxCPUImpl(**(defaults | options))

    return make


def attend(batch: CpuBatch, impl: Any, step: CpuRoutes, layer: int) -> torch.Tensor:
    attention = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
    metadata = batch.metadata
    metadata.flux = step
    output = torch.full((len(batch.query), N * H), float("nan"))
    key = torch.empty(len(batch.query), K, H)
    impl.forward(attention, batch.query, key, key, batch.cache, metadata, output.view(-1, N, H))
    return output.view(-1, N, H)


class TestAttention:
    @pytest.mark.parametrize("name", BATCHES)
    def test_each_row_as_alone(self, name: str, make_impl: Callable) -> None:
        batch = CpuBatch(BATCHES[name])
        batch.poison_skipped_blocks()
        runtime = fixed_runtime()
        step = batch.step(runtime)
        for row, slot in zip(batch.rows, runtime.current.slots, strict=True):
            runtime.table.routes[int(slot)] = torch.tensor(row.routes, dtype=torch.int8)
        for layer in (2, 0, 1):
            impl = make_impl()
            impl.binding = LayerBinding(runtime, layer)
            impl.page_layout = learn_page_layout("vec", BLOCK, H, torch.float32)
            found = attend(batch, impl, step, layer)
            torch.testing.assert_close(found, batch.expected(layer), rtol=0, atol=ATOL)

    def test_layer_without_binding_is_vllms(self, make_impl: Callable) -> None:
        """A layer with a sliding window of its own keeps it, whatever the routes."""
        batch = CpuBatch([Row(0, 150, 150, ALL_SPARSE), Row(200, 1, 100, ALL_SPARSE)])
        runtime = fixed_runtime()
        step = batch.step(runtime)
        runtime.table.routes[:] = SPARSE
        found = attend(batch, make_impl(), step, 0)
        full = [Row(r.computed, r.scheduled, r.prompt, (FULL,) * 3) for r in batch.rows]
        batch.rows = full
        torch.testing.assert_close(found, batch.expected(0), rtol=0, atol=ATOL)

    def test_warm_up_without_a_step_is_vllms(self, make_impl: Callable) -> None:
        batch = CpuBatch([Row(0, 150, 150, (FULL,) * 3)])
        impl = make_impl()
        impl.binding = LayerBinding(fixed_runtime(), 0)
        found = attend(batch, impl, None, 0)
        torch.testing.assert_close(found, batch.expected(0), rtol=0, atol=ATOL)


class TestPlans:
    def test_layers_with_equal_routes_share_a_plan(self) -> None:
        rows = [Row(0, 200, 200, (SPARSE, FULL, SPARSE)), Row(300, 1, 250, (SPARSE, FULL, SPARSE))]
        batch, runtime = CpuBatch(rows), fixed_runtime()
        step = batch.step(runtime)
        for row, slot in zip(rows, runtime.current.slots, strict=True):
            runtime.table.routes[int(slot)] = torch.tensor(row.routes, dtype=torch.int8)
        plans = [step.plan(layer) for layer in (0, 1, 2, 0)]
        assert plans[0] is plans[2] is plans[3]
        assert plans[0] is not plans[1]
        assert batch.builder.schedules == 1

    def test_full_batches_keep_vllms_metadata(self) -> None:
        batch, runtime = CpuBatch(BATCHES["all-full"]), fixed_runtime()
        step = batch.step(runtime)
        runtime.table.routes[:] = FULL
        plan = step.plan(0)
        assert plan.kernel is batch.metadata
        assert plan.tokens is None
        assert plan.sparse_prefills == ()
        assert batch.builder.schedules == 0

    @pytest.mark.parametrize("length", [S + W - 1, S + W, S + W + 1])
    def test_short_rows_take_vllms_kernel(self, length: int) -> None:
        """Up to S + W tokens both routes see the same keys."""
        batch, runtime = CpuBatch([Row(0, length, length)]), fixed_runtime()
        step = batch.step(runtime)
        runtime.table.routes[:] = SPARSE
        plan = step.plan(0)
        assert (plan.kernel is batch.metadata) == (length <= S + W)
        assert len(plan.sparse_prefills) == (length > S + W)

    def test_prefill_plans_are_shared_between_patterns(self) -> None:
        rows = [Row(0, 200, 200, (SPARSE, SPARSE, FULL)), Row(0, 300, 300, (SPARSE, FULL, SPARSE))]
        batch, runtime = CpuBatch(rows), fixed_runtime()
        step = batch.step(runtime)
        for row, slot in zip(rows, runtime.current.slots, strict=True):
            runtime.table.routes[int(slot)] = torch.tensor(row.routes, dtype=torch.int8)
        first, second, third = (step.plan(layer) for layer in range(3))
        assert first.kernel is None
        assert first.sparse_prefills[0][1] is second.sparse_prefills[0][1]
        assert first.sparse_prefills[1][1] is third.sparse_prefills[0][1]
        assert third.sparse_prefills[0][0] == slice(200, 500)


class TestProbe:
    @pytest.mark.parametrize("window", [None, 1, 7, 40, 41, 100])
    def test_causal_attention_without_a_cache(self, window: int | None, make_impl) -> None:
        """A window counts the tokens of the probe; a cache of NaN is not looked at."""
        tokens = 41
        query, key, value = (torch.randn(tokens, heads, H) for heads in (N, K, K))
        kept = torch.full((tokens, H), float("nan"))
        metadata = ProbeMetadata(torch.tensor([0, tokens], dtype=torch.int32), kept)
        output = torch.full((tokens, N, H), float("nan"))
        cache = torch.full((2, K, BLOCK, 2 * H), float("nan"))
        impl = make_impl(sliding_window=window)
        assert impl.forward(None, query, key, value, cache, metadata, output) is output
        pattern = SparsePattern(0, window or tokens, 1)
        q_NTH, k_KTH, v_KTH = (t.transpose(0, 1) for t in (query, key, value))
        expected = masked_attention(q_NTH, k_KTH, v_KTH, 0.3, SPARSE, "prefill", pattern)
        torch.testing.assert_close(output, expected, rtol=0, atol=ATOL)
        torch.testing.assert_close(kept, query.mean(dim=1), rtol=0, atol=1e-6)

    def test_keys_of_another_layer(self, make_impl) -> None:
        query, key, value = (torch.randn(5, heads, H) for heads in (N, K, K))
        starts = torch.tensor([0, 5], dtype=torch.int32)
        owner = ProbeMetadata(starts, None, is_shared=True)
        outputs = torch.full((2, 5, N, H), float("nan"))
        make_impl().forward(None, query, key, value, None, owner, outputs[0])
        impl = make_impl(kv_sharing_target_layer_name="layers.0")
        sharer = ProbeMetadata(starts, None, owner)
        impl.forward(None, query, None, None, None, sharer, outputs[1])
        assert outputs.isfinite().all()
        assert torch.equal(outputs[0], outputs[1])

    def test_layer_that_no_router_looks_at(self, make_impl) -> None:
        query, key = torch.randn(5, N, H), torch.randn(5, K, H)
        metadata = ProbeMetadata(torch.tensor([0, 5], dtype=torch.int32), None)
        output = torch.full((5, N, H), float("nan"))
        make_impl().forward(None, query, key, key, None, metadata, output)
        assert output.isfinite().all()
