"""What rows of `bench_serve` and `bench_overhead` say of the engines they were measured with.

Oracle: vLLM's own configuration, and figures that a made-up engine gives.
"""

import itertools
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_overhead, bench_serve
from benchmarks.engine_driver import EngineDriver
from tests.helpers.models import write_tiny_llama

KERNELS = [("FlashAttnFwdSm90", 4, 3.0), ("gemm", 8, 1.0)]


class MadeUpEngine:
    """Stands in for `Engine`: every prefill takes 2 s, every step 1 ms."""

    def __init__(self, vocab_size: int, **arguments: Any) -> None:
        self.arguments = arguments

    def __enter__(self) -> "MadeUpEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def settings(self) -> dict[str, Any]:
        return {"max_num_seqs": 17, "backend": self.arguments["attention_backend"]}

    def prefill_seconds(self, tokens: int, times: int = 1) -> float:
        return 2.0

    def step_seconds(self, steps: int, batch: int) -> float:
        return 0.001

    def peak_memory(self) -> None:
        return None

    def profile(self, tokens: int) -> list[tuple[str, int, float]]:
        return KERNELS

    def profile_steps(self, steps: int, batch: int) -> list[tuple[str, int, float]]:
        return [(name, steps * calls, steps * ms) for name, calls, ms in KERNELS]

    def start(self, *args: object) -> list[str]:
        return ["request"]

    def wait(self, *args: object) -> None:
        pass

    stop = fix_routes = mix_rows = wait


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def _run(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: object) -> None:
    monkeypatch.setattr(module, "Engine", MadeUpEngine)
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("plan", ["smoke", "smoke_one_by_one"])
def test_serve_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, plan: str):
    out = tmp_path / "rows.json"
    _run(monkeypatch, bench_serve, "--model", model, "--out", out, "--plan", plan)
    for row in json.loads(out.read_text()):
        assert row["engines"] == {
            "flash_attn": {"max_num_seqs": 17, "backend": "FLASH_ATTN"},
            "flux": {"max_num_seqs": 17, "backend": "flux"},
        }
    kernels = tmp_path / "rows.kernels.json"
    assert kernels.exists() == (plan == "smoke")
    if plan == "smoke":
        rows = json.loads(kernels.read_text())
        assert [(row["engine"], row["context"]) for row in rows] == [
            ("baseline", 512),
            ("flux, all SPARSE", 512),
            ("baseline", 512),
            ("flux, 0 rows SPARSE", 512),
            ("flux, 1 rows SPARSE", 512),
            ("flux, 2 rows SPARSE", 512),
        ]
        assert [row.get("batch") for row in rows] == [None, None, 2, 2, 2, 2]
        for row in rows:
            assert row["kernels"] == [
                dict(zip(("name", "calls", "ms"), kernel, strict=True)) for kernel in KERNELS
            ]
        assert all(row["attention_ms"] == 3.0 and row["provenance"] for row in rows)


def test_overhead_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "rows.json"
    options = ("--control", "--contexts", 512, "--repeats", 2)
    _run(monkeypatch, bench_overhead, "--model", model, "--out", out, *options)
    found = [
        (row["metric"], row["policy"], row["engine"]["backend"], row["against_mean_percent"])
        for row in json.loads(out.read_text())
    ]
    policies = {"FLASH_ATTN": "FLASH_ATTN", "full": "flux", "router": "flux"}
    policies["FLASH_ATTN again"] = "FLASH_ATTN"
    assert found == [
        (metric, policy, backend, 0)
        for metric, (policy, backend) in itertools.product(("ttft_s", "tpot_ms"), policies.items())
    ]


@pytest.mark.vllm
def test_settings_are_what_vllm_made_of_the_arguments(model: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = partial(
        EngineArgs,
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_batched_tokens=640,
        kv_cache_memory_bytes=1 << 29,
    )

    def settings(**more: Any) -> tuple[dict[str, Any], Any]:
        config = arguments(**more).create_engine_config()
        driver = object.__new__(EngineDriver)
        driver._core = SimpleNamespace(vllm_config=config)
        return driver.settings(), config

    found, config = settings()
    assert found["max_num_seqs"] == config.scheduler_config.max_num_seqs > 1
    assert (found["max_num_batched_tokens"], found["chunk"]) == (640, 640)
    assert (found["kv_gib"], found["max_model_len"]) == (0.5, 1024)
    fewer, _ = settings(max_num_seqs=3, long_prefill_token_threshold=128)
    assert (fewer["max_num_seqs"], fewer["chunk"], fewer["max_num_batched_tokens"]) == (3, 128, 640)
    json.dumps(found)
