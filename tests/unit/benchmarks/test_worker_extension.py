"""What benchmarks do to a worker's layers and routes, without an engine."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.worker_extension import BenchmarkWorker
from flux_vllm.config import FluxConfig
from flux_vllm.router.route import Route
from flux_vllm.routing.runtime import FluxRuntime


def test_mix_rows_gives_live_requests_routes_of_their_own() -> None:
    runtime = FluxRuntime(
        FluxConfig(policy="static", sparse_layers=(0,), sink_tokens=4, window_tokens=8),
        info=None,
        num_layers=3,
        routed_layers=(0, 2),
        max_requests=4,
        device=torch.device("cpu"),
    )
    names = ["a", "b", "c"]
    slots = [runtime.table.acquire(name)[0] for name in names]
    worker = SimpleNamespace(flux_fix_routes=runtime.fix_routes)
    sparse, full, unrouted = int(Route.SPARSE), int(Route.FULL), int(Route.UNDECIDED)
    for count in (2, 1):  # the second takes the first back
        BenchmarkWorker.mix_rows(worker, count)
        rows = runtime.table.routes[slots].tolist()
        wanted = [sparse] * count + [full] * (3 - count)
        assert rows == [[route, unrouted, route] for route in wanted]


class _Attends:
    def forward(self, output: str) -> str:
        return f"attended {output}"


@pytest.mark.vllm
def test_skip_attention_leaves_layers_of_other_kinds_alone() -> None:
    """Layers of experts and states stand beside those of attention, and call nothing `impl`."""
    from vllm.model_executor.layers.attention import Attention

    attention = Attention.__new__(Attention)  # without an engine's configuration
    attention.impl = _Attends()
    layers = {"model.layers.0.attn": attention, "model.layers.0.experts": torch.nn.Module()}
    compilation = SimpleNamespace(static_forward_context=layers)
    config = SimpleNamespace(compilation_config=compilation)
    worker = SimpleNamespace(model_runner=SimpleNamespace(vllm_config=config))
    for skip, wanted in ((True, "as it was"), (False, "attended as it was")):
        BenchmarkWorker.skip_attention(worker, skip)
        BenchmarkWorker.skip_attention(worker, skip)  # twice is once
        assert attention.impl.forward(output="as it was") == wanted
