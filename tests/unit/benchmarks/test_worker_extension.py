"""What benchmarks do to a worker's routes, on a runtime without an engine."""

from types import SimpleNamespace

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
