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
from flux_vllm.attention_backend.rotary import RotaryInverse
from flux_vllm.config import FluxConfig
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import full_probability
from flux_vllm.router.state import QuerySums
from flux_vllm.runtime import FluxRuntime
from tests.helpers.reference_router import pooled_positions
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


def make_runtime(config: FluxConfig, **router: Any) -> FluxRuntime:
    return FluxRuntime(
        config,
        router.get("router"),
        router.get("info"),
        num_layers=LAYERS,
        routed_layers=tuple(range(LAYERS)),
        max_requests=4,
        device=CPU,
        reduce_mean=lambda tensor: tensor,
    )


def fixed_runtime() -> FluxRuntime:
    config = FluxConfig(policy="static", sparse_layers=(0,), sink_tokens=S, window_tokens=W)
    return make_runtime(config)


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
            impl.binding = LayerBinding(runtime, layer, None)
            impl.group_index = layer
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
        impl.binding = LayerBinding(fixed_runtime(), 0, None)
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


@pytest.fixture(scope="module")
def rope() -> Any:
    """A rotary embedding of vLLM's."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        return get_rope(H, 512, rope_parameters={"rope_theta": 1e4}, dtype=torch.float32)


class TestRouting:
    """P(FULL) of each layer against the router's network over positions pooled one by one."""

    POOL = 24
    PROMPT = 150

    @pytest.fixture(params=[True, False], ids=["both-ends", "latest-alone"])
    def runtime(self, request: pytest.FixtureRequest) -> FluxRuntime:
        info = RouterInfo(
            base_model="",
            num_layers=LAYERS,
            head_dim=H,
            pool_tokens=self.POOL,
            pool_prefix=request.param,
            sink_tokens=S,
            window_tokens=W,
        )
        router = LayerRouter(LAYERS, H).requires_grad_(False)
        for parameter in router.parameters():
            parameter.mul_(4)
        return make_runtime(FluxConfig(threshold=0.4), router=router, info=info)

    @pytest.mark.parametrize("chunks", [[150], [64, 86], [49, 50, 51], [100, 49, 1]], ids=str)
    def test_probability_by_definition(self, runtime, rope, chunks: list[int]) -> None:
        sums = QuerySums(LAYERS, 60, BLOCK, H, CPU)
        inverse = RotaryInverse(rope, H, CPU)
        before = torch.randn(LAYERS, self.PROMPT, N, H)  # queries before RoPE
        blocks = torch.tensor([[9, 4, 7, 5, 11, 59]], dtype=torch.int32)
        start = 0
        for chunk in chunks:
            batch = CpuBatch([Row(start, chunk, self.PROMPT)])
            # One cache through all chunks: the same blocks each time.
            positions = torch.arange(start, start + chunk)
            batch.metadata.block_table = blocks
            batch.metadata.slot_mapping = blocks[0].long()[positions // BLOCK] * BLOCK + (
                positions % BLOCK
            )
            step = batch.step(runtime, sums)
            for layer in range(LAYERS):
                flat = before[layer, start : start + chunk].flatten(1)
                after, _ = rope.forward_native(positions, flat.clone(), flat.clone())
                binding = LayerBinding(runtime, layer, inverse)
                step.route(binding, layer, after.view(chunk, N, H))
            end = start + chunk
            slot = int(runtime.current.slots[0])
            pooled = pooled_positions(
                start,
                end,
                self.PROMPT,
                self.POOL,
                torch.ones(start, dtype=torch.bool),
                runtime.info.pool_prefix,
            )
            for layer in range(LAYERS):
                mean = before[layer, pooled].mean(dim=(0, 1))[None]
                expected = full_probability(runtime.router(layer, mean)).item()
                found = runtime.table.full_probability[slot, layer].item()
                assert found == pytest.approx(expected, abs=2e-3)  # sums are kept in bfloat16
                assert int(runtime.table.routes[slot, layer]) == (found >= 0.4)
            runtime.end_step()
            start = end
        assert runtime.table.settled_prompt_len[slot] == self.PROMPT

    def test_settled_rows_are_not_routed_again(self, runtime, rope) -> None:
        """A resumed request rebuilds its sums and keeps its routes."""
        sums = QuerySums(LAYERS, 60, BLOCK, H, CPU)
        (slot,) = runtime.table.acquire(["r0"])
        runtime.table.settled_prompt_len[slot] = 100
        runtime.table.routes[slot] = torch.tensor([0, 1, 0], dtype=torch.int8)
        batch = CpuBatch([Row(0, 130, 100)])
        step = batch.step(runtime, sums)
        inverse = RotaryInverse(rope, H, CPU)
        step.route(LayerBinding(runtime, 1, inverse), 1, batch.query)
        assert runtime.table.routes[slot].tolist() == [0, 1, 0]
        assert int(sums.counts.sum()) == 100
        assert sums.sums[1].any()
        assert not sums.sums[0].any()
