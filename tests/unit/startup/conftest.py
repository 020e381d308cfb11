"""One rank that counts nothing, and vLLM's own RoPE."""

from typing import Any

import pytest
import torch

from tests.unit.startup.fakes import ONE_STAGE, H


@pytest.fixture(autouse=True)
def _no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUX_METRICS_DIR", raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


@pytest.fixture(scope="module")
def rope() -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        return get_rope(H, 512, rope_parameters={"rope_theta": 1e4}, dtype=torch.float32)


@pytest.fixture
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import distributed

    monkeypatch.setattr(distributed, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "get_pp_group", lambda: ONE_STAGE)
