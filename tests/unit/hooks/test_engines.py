"""Which engines the patches of vLLM change: those that chose flux, and no other.

Oracle: vLLM's unwrapped functions, whose answers the wrapped ones must give; recorded calls.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.hooks import front_end
from flux_vllm.hooks import worker as worker_hooks
from tests.unit.hooks.step_batches import unwrapped

pytestmark = pytest.mark.vllm


class TestOtherEngines:
    """Engines that did not ask for flux get what vLLM's own functions give."""

    def selector_config(self, **values: Any) -> SimpleNamespace:
        defaults = {"use_mla": False, "use_sparse": False, "kv_cache_dtype": "auto"}
        return SimpleNamespace(**(defaults | values))

    def answer(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is its answer
            return type(error), str(error)

    @pytest.mark.parametrize("backend", [None, "CPU_ATTN", "TORCH_SDPA", "FLASH_ATTN", "CUSTOM"])
    @pytest.mark.parametrize("model", [{}, {"use_mla": True}, {"use_sparse": True}], ids=str)
    def test_cpu_chooses_as_before(self, backend: str | None, model: dict) -> None:
        from vllm.platforms.cpu import CpuPlatform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        front_end.install()
        selected = None if backend is None else AttentionBackendEnum[backend]
        original = unwrapped(vars(CpuPlatform)["get_attn_backend_cls"].__func__)
        config = self.selector_config(**model)
        for extra in ({}, {"num_heads": 4}):
            expected = self.answer(original, CpuPlatform, selected, config, **extra)
            found = self.answer(CpuPlatform.get_attn_backend_cls, selected, config, **extra)
            assert found == expected
            if not model:
                assert found.endswith("CPUAttentionBackend")

    def test_flux_is_chosen_for_flux(self) -> None:
        from vllm.platforms.cpu import CpuPlatform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        from flux_vllm import plugin

        plugin.register()
        path = CpuPlatform.get_attn_backend_cls(
            AttentionBackendEnum["FLUX"], self.selector_config(), num_heads=4
        )
        assert path == plugin.BACKEND_PATH

    @pytest.mark.parametrize("model", ["use_mla", "use_sparse"])
    def test_flux_refuses_latent_attention(self, model: str) -> None:
        from vllm.platforms.cpu import CpuPlatform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        from flux_vllm import plugin

        plugin.register()
        with pytest.raises(UnsupportedConfigurationError) as error:
            CpuPlatform.get_attn_backend_cls(
                AttentionBackendEnum["FLUX"], self.selector_config(**{model: True})
            )
        assert str(error.value) == (
            "--attention-backend flux: expected a model with ordinary attention over keys and "
            "values, found multi-head latent or sparse attention (MLA); serve it without "
            "--attention-backend flux"
        )

    @pytest.mark.parametrize("name", [None, "CPU_ATTN", "CUSTOM"])
    def test_configuration_is_not_looked_at(self, name: str | None) -> None:
        backend = None if name is None else SimpleNamespace(name=name)
        made = SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
        with mock.patch("flux_vllm.metrics.directory.prepare_front_end") as prepare:
            assert front_end._check_engine_config(lambda self, *a: made, None, 1) is made
        prepare.assert_not_called()

    def test_memory_is_measured_as_before(self) -> None:
        attention = SimpleNamespace(backend=None)
        worker = SimpleNamespace(vllm_config=SimpleNamespace(attention_config=attention))
        before = dict(vars(worker))
        with mock.patch("flux_vllm.hooks.worker.attach") as attach:
            assert worker_hooks._attach_then_measure(lambda self: 123, worker) == 123
        attach.assert_not_called()
        assert vars(worker) == before


class TestFluxEngine:
    def test_configuration_is_checked_before_anything_is_made(self) -> None:
        """A refusal leaves no folder and no collector behind."""
        order = mock.Mock()
        attention = SimpleNamespace(backend=SimpleNamespace(name="FLUX"))
        made = SimpleNamespace(attention_config=attention)
        with (
            mock.patch("flux_vllm.startup.drafter.choose_drafter_backend", order.choose),
            mock.patch("flux_vllm.startup.check.check_configuration", order.check),
            mock.patch("flux_vllm.metrics.directory.prepare_front_end", order.prepare),
        ):
            assert front_end._check_engine_config(lambda self: made, None) is made
            calls = [mock.call.choose(made), mock.call.check(made), mock.call.prepare()]
            assert order.mock_calls == calls
            order.check.side_effect = UnsupportedConfigurationError("refused")
            with pytest.raises(UnsupportedConfigurationError, match="refused"):
                front_end._check_engine_config(lambda self: made, None)
        assert order.prepare.call_count == 1

    def test_attaches_before_measuring(self) -> None:
        import torch

        order = mock.Mock()
        attention = SimpleNamespace(backend=SimpleNamespace(name="FLUX"))
        worker = SimpleNamespace(
            vllm_config=SimpleNamespace(attention_config=attention),
            model_runner=SimpleNamespace(get_model=lambda: "model"),
            device=torch.device("cpu"),
        )
        with (
            mock.patch("flux_vllm.hooks.worker.attach", order.attach),
            mock.patch("flux_vllm.hooks.worker.reserve_buffers", order.reserve),
            mock.patch("flux_vllm.hooks.worker.hook_worker", order.hook),
            mock.patch("flux_vllm.hooks.worker._device_memory", side_effect=[5, 105]),
        ):
            order.measure.return_value = 1000
            found = worker_hooks._attach_then_measure(order.measure, worker)
        runtime = order.attach.return_value
        assert found is order.reserve.return_value
        assert order.mock_calls == [
            mock.call.attach(worker.model_runner, worker.vllm_config, worker.device),
            mock.call.hook(worker, runtime),
            mock.call.measure(worker),
            # Less what attaching put on the device, the router above all.
            mock.call.reserve(900, worker, runtime),
        ]

    def test_router_is_no_shard(self, tmp_path: Path) -> None:
        """vLLM reads all safetensors files of a folder without an index."""
        from vllm.model_executor.model_loader import default_loader

        worker_hooks.install()
        files = [str(tmp_path / n) for n in ("a.safetensors", "flux_router.safetensors")]
        found = default_loader.filter_duplicate_safetensors_files(
            files, str(tmp_path), "model.safetensors.index.json"
        )
        assert found == files[:1]
        (tmp_path / "model.safetensors.index.json").write_text(
            '{"weight_map": {"w": "a.safetensors"}}'
        )
        found = default_loader.filter_duplicate_safetensors_files(
            [*files, str(tmp_path / "b.safetensors")],
            str(tmp_path),
            "model.safetensors.index.json",
        )
        assert found == files[:1]
