"""The CPU backend's classes: what they refuse, and what they say of themselves.

Oracle: the messages, and vLLM's own base classes.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_vllm.errors import UnsupportedConfigurationError

pytestmark = pytest.mark.vllm

N, H = 4, 32


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
            "num_kv_heads": 2,
            "alibi_slopes": None,
            "sliding_window": None,
            "kv_cache_dtype": "auto",
        }
        with set_current_vllm_config(config):
            return FluxCPUImpl(**(defaults | options))

    return make


REFUSED = [
    ({"alibi_slopes": [0.5] * N}, "ALiBi slopes"),
    ({"logits_soft_cap": 30.0}, "attention logits softcap"),
    ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
    ({"attn_type": "encoder_decoder"}, "attention of type encoder_decoder"),
    (
        {"alibi_slopes": [0.5] * N, "logits_soft_cap": 30.0},
        "ALiBi slopes, attention logits softcap",
    ),
]


class TestImpl:
    @pytest.mark.parametrize(("options", "what"), REFUSED, ids=[what for _, what in REFUSED])
    def test_refused(self, make_impl: Callable, options: dict, what: str) -> None:
        with pytest.raises(UnsupportedConfigurationError) as error:
            make_impl(**options)
        assert str(error.value) == (
            "layer routes on the CPU: expected plain causal attention over a KV cache, found "
            f"{what}; serve with --attention-backend CPU_ATTN"
        )

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"sliding_window": 128},
            {"sinks": torch.zeros(N)},
            {"kv_sharing_target_layer_name": "layers.0"},
            {"kv_cache_dtype": "fp8_e5m2"},
        ],
        ids=["plain", "window", "learned sinks", "another layer's KV cache", "float8"],
    )
    def test_accepted(self, make_impl: Callable, options: dict) -> None:
        """Unbound: a layer with a sliding window of its own stays so."""
        assert make_impl(**options).binding is None


class TestBackend:
    @pytest.fixture
    def backend(self) -> Any:
        from flux_vllm.attention_backend.backend import FluxBackend

        return FluxBackend

    def test_names_its_own_classes(self, backend: Any) -> None:
        from flux_vllm.attention_backend.cpu import backend as cpu

        assert backend is cpu.FluxCPUBackend
        assert backend.get_name() == "FLUX"
        assert backend.get_impl_cls() is cpu.FluxCPUImpl
        assert backend.get_builder_cls() is cpu.FluxCPUMetadataBuilder

    def test_is_vllms_otherwise(self, backend: Any) -> None:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        assert issubclass(backend, CPUAttentionBackend)
        assert backend.get_supported_head_sizes() == CPUAttentionBackend.get_supported_head_sizes()
        assert backend.supported_dtypes == CPUAttentionBackend.supported_dtypes

    @pytest.mark.parametrize("kind", ["encoder", "encoder_only", "encoder_decoder"])
    def test_only_decoders(self, backend: Any, kind: str) -> None:
        assert backend.supports_attn_type("decoder")
        assert not backend.supports_attn_type(kind)
        assert not backend.supports_non_causal()

    def test_metadata_is_never_borrowed_from_another_group(self, backend: Any) -> None:
        """vLLM would swap the tables in and leave the views as they were."""
        assert backend.get_builder_cls().supports_update_block_table is False

    def test_no_full_graphs(self, backend: Any) -> None:
        from vllm.v1.attention.backend import AttentionCGSupport

        builder = backend.get_builder_cls()
        assert builder._cudagraph_support == AttentionCGSupport.NEVER


@pytest.mark.parametrize(("policy", "planned"), [("full", False), ("sparse", True)])
def test_policy_full_is_vllms_own_call(
    monkeypatch: pytest.MonkeyPatch, policy: str, planned: bool
) -> None:
    from flux_vllm.attention_backend.cpu import backend as cpu

    monkeypatch.setattr(
        cpu.CPUAttentionMetadataBuilder, "build", lambda *args: SimpleNamespace(), raising=True
    )
    monkeypatch.setattr(cpu, "CpuRoutes", lambda *args: "a plan")
    runtime = SimpleNamespace(current="a batch", config=SimpleNamespace(policy=policy))
    builder = cpu.FluxCPUMetadataBuilder.__new__(cpu.FluxCPUMetadataBuilder)
    builder._layers = [
        SimpleNamespace(impl=SimpleNamespace(binding=SimpleNamespace(runtime=runtime)))
    ]
    assert builder.build(0, None).flux == ("a plan" if planned else None)
