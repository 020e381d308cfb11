"""The benchmark of a probe: routes, rows and turns. Oracle: figures that made-up engines give."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_probe
from benchmarks.serve_cases import Shape
from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.route import Route, choose_route, full_probability

SHAPE = Shape(layers=4, heads=4, kv_heads=2, head_dim=16, vocab_size=64)
SPARSE, FULL = int(Route.SPARSE), int(Route.FULL)


class MadeUpEngine:
    """A first token takes 1 s; with a router 1.1 s."""

    def __init__(self, vocab_size: int, **arguments: Any) -> None:
        self._flux = arguments["additional_config"]["flux"]

    def __enter__(self) -> "MadeUpEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait(self) -> None:
        pass

    def settings(self) -> dict[str, Any]:
        return {"chunk": 8192}

    def prefill_seconds(self, tokens: int, times: int = 1) -> float:
        return 1.1 if "router" in self._flux else 1.0

    def call_worker(self, method: str) -> Any:
        return {
            "time_probes": ([0.001, 0.002, 0.003], [0.011, 0.012, 0.013]),
            "flux_status": {
                "routed_layers": [0, 1, 2, 3],
                "recent": [{"routes": [FULL, SPARSE, FULL, SPARSE]}],
            },
            "begin_host_times": None,
            "end_host_times": {"PromptProbe.decide": (10, 0.01)},
        }[method]


def test_fixed_router_decides_the_same_for_every_prompt(tmp_path: Path) -> None:
    router, info = read_router(bench_probe.write_fixed_router(tmp_path, SHAPE, [1, 3], 32, 128))
    features = torch.randn(4, 5, info.inputs.vectors * SHAPE.head_dim)
    routes = choose_route(full_probability(router.forward_all(features)), 0.5)
    assert routes.tolist() == [[FULL] * 5, [SPARSE] * 5] * 2


def test_fixed_router_reads_one_layer_as_a_trained_one(tmp_path: Path) -> None:
    router, info = read_router(bench_probe.write_fixed_router(tmp_path, SHAPE, [1, 3], 32, 128))
    first = router.linear("features.0")[0]
    assert info.inputs.layers_read(first, range(4)) == set(info.context_layers) == {2}


def test_other_routes_than_those_given_are_no_measurement() -> None:
    status = {"routed_layers": [0, 1], "recent": [{"routes": [SPARSE, FULL]}]}
    bench_probe.check_routes(status, [0])
    for wrong in (status, status | {"recent": []}):
        with pytest.raises(RuntimeError, match="expected probed prompts"):
            bench_probe.check_routes(wrong, [1])


def test_rows(monkeypatch, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"head_dim": 16, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "rows.json"
    monkeypatch.setattr(bench_probe, "Engine", MadeUpEngine)
    arguments = ["--contexts", "512", "1024", "--repeats", "3", "2", "--share", "0.5"]
    command = ["bench_probe", "--model", str(tmp_path), "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    bench_probe.main()
    rows = json.loads(out.read_text())
    assert [row["metric"] for row in rows] == ["probe_ms", "ttft_s", "ttft_s", "host_us", "host_us"]
    assert rows[0]["done"] == [11, 12, 13]
    assert rows[1]["probed"]["percent"] == pytest.approx(10)
    assert rows[1]["given again"]["percent"] == 0
    assert [len(row["values"]["probed"]) for row in rows[1:3]] == [3, 2]
    assert rows[1]["engine"]["sparse_layers"] == [1, 3]
    assert rows[4]["functions"]["PromptProbe.decide"] == {"us": pytest.approx(1000), "calls": 1}
