"""Who counts, what the counters say of a worker, and what is said where they cannot be written.

Oracle: the labels and messages written down by hand.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flux_vllm.batch import Batch
from flux_vllm.metrics import directory
from flux_vllm.routing.decode_counts import DecodeKeys
from flux_vllm.startup import report
from flux_vllm.startup.attach import attach
from tests.unit.startup.fakes import CPU, L, Model, make_attention, make_config, runner_of, write

pytestmark = pytest.mark.vllm


@pytest.mark.usefixtures("_one_rank")
class TestReport:
    @pytest.fixture
    def model(self, rope: Any, tmp_path: Path) -> Model:
        write(tmp_path)
        return Model([make_attention(i) for i in range(L)], rope)

    def test_no_front_end_no_numbers(
        self, tmp_path: Path, model: Model, monkeypatch, caplog: Any
    ) -> None:
        """As in a worker whose environment the API server's variable did not reach."""
        monkeypatch.setattr(report.logger, "propagate", True)
        with caplog.at_level("WARNING", report.logger.name):
            assert attach(runner_of(model), make_config(tmp_path), CPU).reporter is None
        (message,) = caplog.messages
        assert "FLUX_METRICS_DIR or PROMETHEUS_MULTIPROC_DIR" in message
        assert "nothing is counted" in message

    def test_first_rank_counts(self, tmp_path: Path, model: Model, monkeypatch) -> None:
        monkeypatch.setenv("FLUX_METRICS_DIR", str(tmp_path))
        config = make_config(tmp_path, {"threshold": 0.25})
        assert attach(runner_of(model), config, CPU).reporter is not None
        info = directory.FluxCollector(str(tmp_path)).collect()
        (sample,) = next(m for m in info if m.name == "flux_router_info").samples
        assert sample.value == 1
        assert sample.labels == {
            "model_name": "served",
            "policy": "router",
            "base_model": "org/Other",
            "threshold": "0.25",
            "sparse_pattern": "streaming",
            "sink_tokens": "64",
            "window_tokens": "256",
            "full_decode_tokens": "0",
            "sparse_prefill": "false",
            "probe": "128+128",
            "pools": "ends:48",
            "kernels": "cpu",
        }

    @pytest.mark.parametrize("plugins", [None, "flux", "flux,flux_live"])
    def test_ring_only_for_a_live_page(
        self, tmp_path: Path, model: Model, monkeypatch, plugins: str | None
    ) -> None:
        monkeypatch.setenv("FLUX_METRICS_DIR", str(tmp_path))
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        if plugins is not None:
            monkeypatch.setenv("VLLM_PLUGINS", plugins)
        runtime = attach(runner_of(model), make_config(tmp_path), CPU)
        assert runtime.reporter is not None
        assert (runtime.journal is not None) == (plugins == "flux,flux_live")

    @pytest.mark.parametrize("name", ["MetricStore", "RouteJournal"])
    def test_full_disk_is_said_and_served(
        self, tmp_path: Path, model: Model, monkeypatch, caplog: Any, name: str
    ) -> None:
        def no_room(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(report, name, no_room)
        monkeypatch.setenv("FLUX_METRICS_DIR", str(tmp_path))
        monkeypatch.setenv("VLLM_PLUGINS", "flux_live")
        monkeypatch.setattr(report.logger, "propagate", True)
        with caplog.at_level("WARNING", report.logger.name):
            runtime = attach(runner_of(model), make_config(tmp_path), CPU)
        assert (runtime.reporter is None) == (name == "MetricStore")
        assert runtime.journal is None
        what = {"MetricStore": "counters", "RouteJournal": "the latest requests' routes"}[name]
        (message,) = caplog.messages
        assert message == (
            f"flux: expected room for {what} in {tmp_path}, found: [Errno 28] No space left on "
            "device; requests are served without"
        )

    def test_other_ranks_do_not(self, tmp_path: Path, model: Model, monkeypatch) -> None:
        from vllm import distributed

        monkeypatch.setenv("FLUX_METRICS_DIR", str(tmp_path))
        monkeypatch.setattr(distributed, "get_tensor_model_parallel_rank", lambda: 1)
        runtime = attach(runner_of(model), make_config(tmp_path), CPU)
        assert runtime.reporter is None
        assert not runtime.reads_back

    def test_later_stages_count_what_their_kernels_read(
        self, tmp_path: Path, model: Model, monkeypatch
    ) -> None:
        """The first one counts the requests and all that the host knows."""
        from vllm import distributed

        monkeypatch.setenv("FLUX_METRICS_DIR", str(tmp_path))
        monkeypatch.setenv("VLLM_PLUGINS", "flux_live")
        stage = SimpleNamespace(world_size=1, is_first_rank=False)
        monkeypatch.setattr(distributed, "get_pp_group", lambda: stage)
        runtime = attach(runner_of(model), make_config(tmp_path), CPU)
        assert runtime.reads_back
        assert runtime.journal is None
        reporter = runtime.reporter
        one = np.ones(1, dtype=np.int64)
        batch = Batch(("a",), 400 * one, 0 * one, 400 * one, one == 1)
        reporter.record(batch, np.ones((1, L), dtype=np.int8), one == 1)
        reporter.record_probes(np.full((1, L), np.nan), 1)
        reporter.record_decode(DecodeKeys(3, 7, 0))
        reporter.flush()
        counted = {
            (sample.name, sample.labels.get("phase")): sample.value
            for metric in directory.FluxCollector(str(tmp_path)).collect()
            for sample in metric.samples
            if sample.value and sample.name != "flux_router_info"
        }
        assert counted == {
            ("flux_attended_tokens_total", "decode"): 3,
            ("flux_context_tokens_total", "decode"): 7,
        }
