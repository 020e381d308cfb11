"""Which kernels a layer gets, and that the log says why where FlashAttention-3 could have run.

Oracle: the log, and the names of the classes; vLLM's version lookup and the GPU are stood in for.
"""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from flux_vllm.attention_backend.cuda import choose
from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.config import FluxConfig
from flux_vllm.errors import FluxConfigError

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def _said_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    choose._say_why_triton.cache_clear()
    monkeypatch.setattr(choose.logger, "propagate", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=4),
    )


def name_of(kernels: str | None = None, version: int = 3, head_size: int = 128) -> str:
    impl = SimpleNamespace(
        vllm_flash_attn_version=version,
        head_size=head_size,
        scale=1.0,
        num_heads=4,
        num_kv_heads=2,
        sinks=None,
        is_float8=False,
    )
    runtime = Mock(config=FluxConfig(kernels=kernels), sink_tokens=16, window_tokens=32)
    runtime.table.device = torch.device("cpu")
    return choose.choose_kernels(impl, runtime).name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("unavailable", "version", "reason"),
    [
        ("No module named '_vllm_fa3_C'", 3, "No module named '_vllm_fa3_C'"),
        (None, 2, "vLLM takes FlashAttention-2 for a head size of 128"),
    ],
    ids=["not-built", "not-for-this-head"],
)
def test_hopper_without_fa3_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unavailable: str | None,
    version: int,
    reason: str,
) -> None:
    monkeypatch.setattr(choose, "is_hopper", lambda: True)
    monkeypatch.setattr(fa3, "why_unavailable", lambda: unavailable)
    assert [name_of(version=version) for _ in range(3)] == ["triton"] * 3
    (message,) = caplog.messages
    assert message.startswith(
        f"flux: expected FlashAttention-3 on this GPU, found none that can be used ({reason}); "
    )


@pytest.mark.parametrize("kernels", [None, "triton"])
def test_nothing_is_said_where_triton_is_no_surprise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernels: str | None
) -> None:
    monkeypatch.setattr(choose, "is_hopper", lambda: kernels is not None)
    monkeypatch.setattr(fa3, "why_unavailable", lambda: "another GPU")
    assert name_of(kernels, version=2) == "triton"
    assert caplog.messages == []


def test_fa3_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa3, "why_unavailable", lambda: None)
    assert name_of() == name_of("fa3") == "fa3"
    with pytest.raises(FluxConfigError, match="expected FlashAttention-3"):
        name_of("fa3", version=2)


@pytest.fixture
def make_impl(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends import flash_attn

    from flux_vllm.attention_backend.cuda.backend import FluxCUDAImpl

    for name in ("get_flash_attn_version", "flash_attn_supports_quant_query_input"):
        monkeypatch.setattr(flash_attn, name, lambda *args, **kwargs: 2, raising=False)

    def make(heads: int, kv_heads: int) -> Any:
        with set_current_vllm_config(VllmConfig()):
            return FluxCUDAImpl(heads, 64, 0.1, kv_heads, None, None, "auto")

    return make


def test_more_query_heads_than_a_tile_holds_are_refused(make_impl: Any) -> None:
    assert make_impl(128, 2).num_queries_per_kv == 64
    with pytest.raises(NotImplementedError) as error:
        make_impl(130, 2)
    assert str(error.value) == (
        "layer routes on CUDA: expected plain causal attention over a KV cache, found 65 query "
        "heads a KV head (at most 64); serve with --attention-backend FLASH_ATTN"
    )
