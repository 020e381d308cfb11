"""Our patches of vLLM apply once, whatever is imported first, and say what they no longer find.

Oracle: vLLM's unwrapped functions. Pinned: the order of imports does not matter (a program may load
the plugins before EngineArgs is there, and import our backend before the worker). `test_sources.py`
watches what is wrapped.
"""

import subprocess
import sys
from typing import Any
from unittest import mock

import pytest

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.hooks import front_end
from flux_vllm.hooks import worker as worker_hooks
from flux_vllm.hooks.wrap import wrap
from tests.unit.hooks.step_batches import unwrapped

pytestmark = pytest.mark.vllm


class TestWrapping:
    def test_once(self) -> None:
        from vllm import plugins
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms.cpu import CpuPlatform

        def now() -> list[Any]:
            return [
                vars(CpuPlatform)["get_attn_backend_cls"].__func__,
                EngineArgs.create_engine_config,
                plugins.load_general_plugins,
            ]

        front_end.install()
        wrapped = now()
        front_end.install()
        assert all(a is b for a, b in zip(wrapped, now(), strict=True))
        assert all(not hasattr(unwrapped(f), "__flux_wrapped__") for f in wrapped)

    def test_worker_hooks_once(self) -> None:
        from vllm.model_executor.model_loader import default_loader
        from vllm.v1.worker.cpu_worker import CPUWorker
        from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
        from vllm.v1.worker.gpu_worker import Worker

        def now() -> list[Any]:
            return [
                CPUWorker.determine_available_memory,
                Worker.determine_available_memory,
                Worker.get_kv_cache_spec,
                default_loader.filter_duplicate_safetensors_files,
                StandaloneARSpeculator.load_draft_model,
            ]

        worker_hooks.install()
        wrapped = now()
        worker_hooks.install()
        assert all(a is b for a, b in zip(wrapped, now(), strict=True))
        assert all(not hasattr(unwrapped(f), "__flux_wrapped__") for f in wrapped)

    def test_arguments_and_result_pass_through(self) -> None:
        class Owner:
            def method(self, a: int, b: int = 2) -> tuple:
                "Doc."
                return self, a, b

            @classmethod
            def of_class(cls, a: int, *, b: int = 2) -> tuple:
                return cls, a, b

        def through(original: Any, *args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        class Derived(Owner):
            pass

        wrap(Owner, "method", through)
        wrap(Owner, "of_class", through, is_classmethod=True)
        owner = Derived()
        assert owner.method(1, b=3) == (owner, 1, 3)
        assert Derived.of_class(1, b=3) == (Derived, 1, 3)
        assert Owner.method.__doc__ == "Doc."

    def test_a_function_that_is_gone_is_named(self) -> None:
        class Owner:
            pass

        with pytest.raises(UnsupportedConfigurationError, match="function method of Owner in vLLM"):
            wrap(Owner, "method", lambda original: None)

    def test_a_function_that_is_gone_ends_no_other_engine(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Plugins are loaded again and again, in processes that never ask for flux."""

        def gone() -> None:
            raise UnsupportedConfigurationError("no function create_engine_config")

        loaded = mock.Mock()
        monkeypatch.setattr(front_end, "install", gone)
        monkeypatch.setattr(front_end.logger, "propagate", True)
        with caplog.at_level("WARNING", front_end.logger.name):
            front_end._hook_again(loaded)
        loaded.assert_called_once_with()
        assert caplog.messages[0].endswith("starts: no function create_engine_config")

    @pytest.mark.slow
    def test_whatever_is_imported_first(self) -> None:
        """Plugins before EngineArgs, the backend before the worker: all hooks are there."""
        code = (
            "from vllm.plugins import load_general_plugins\n"
            "load_general_plugins()\n"
            "import flux_vllm.attention_backend.backend\n"
            "from vllm.v1.worker.cpu_worker import CPUWorker\n"
            "from vllm.engine.arg_utils import EngineArgs\n"
            "EngineArgs(model='.')\n"
            "print([hasattr(f, '__flux_wrapped__') for f in\n"
            "  (EngineArgs.create_engine_config, CPUWorker.determine_available_memory)])\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1:] == ["[True, True]"], done.stderr[-2000:]
