"""Our patches of vLLM: they apply once, do what they are for, and leave other engines alone.

Oracle: vLLM's unwrapped functions, whose answers the wrapped ones must give; recorded calls.
Pinned: the order of imports does not matter (a program may load the plugins before EngineArgs is
there, and import our backend before the worker). `test_sources.py` watches what is wrapped.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.hooks import front_end, rows
from flux_vllm.hooks import worker as worker_hooks
from flux_vllm.hooks.wrap import wrap
from flux_vllm.routing.prompts import Prompt

pytestmark = pytest.mark.vllm


def unwrapped(function: Any) -> Any:
    assert hasattr(function, "__flux_wrapped__")
    return function.__wrapped__


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
        from vllm.v1.worker.gpu_worker import Worker

        def now() -> list[Any]:
            return [
                CPUWorker.determine_available_memory,
                Worker.determine_available_memory,
                Worker.get_kv_cache_spec,
                default_loader.filter_duplicate_safetensors_files,
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
            mock.patch("flux_vllm.startup.check.check_configuration", order.check),
            mock.patch("flux_vllm.metrics.directory.prepare_front_end", order.prepare),
        ):
            assert front_end._check_engine_config(lambda self: made, None) is made
            assert order.mock_calls == [mock.call.check(made), mock.call.prepare()]
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
        ):
            order.measure.return_value = 1000
            found = worker_hooks._attach_then_measure(order.measure, worker)
        runtime = order.attach.return_value
        assert found is order.reserve.return_value
        assert order.mock_calls == [
            mock.call.attach(worker.model_runner, worker.vllm_config, worker.device),
            mock.call.hook(worker, runtime),
            mock.call.measure(worker),
            mock.call.reserve(1000, worker, runtime),
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


def new_request(name: str, tokens: list[int] | None, computed: int = 0, **changes: Any) -> Any:
    """Make vLLM's own NewRequestData."""
    from vllm.v1.core.sched.output import NewRequestData

    fields = {
        "req_id": name,
        "prompt_token_ids": tokens,
        "mm_features": [],
        "sampling_params": None,
        "pooling_params": None,
        "block_ids": ([1],),
        "num_computed_tokens": computed,
        "lora_request": None,
    }
    return NewRequestData(**fields | changes)


class TestPrompts:
    def test_token_ids(self) -> None:
        found = rows.prompt_of(new_request("a", [4, 5, 6], lora_request="adapter"))
        assert found == Prompt("a", 3, [4, 5, 6], "adapter")

    def test_prompt_of_a_resumed_request_leaves_its_outputs_out(self) -> None:
        found = rows.prompt_of(new_request("a", [4, 5, 6], prefill_token_ids=[4, 5, 6, 7, 8]))
        assert (found.length, found.tokens) == (3, [4, 5, 6])

    @pytest.mark.parametrize(
        "changes",
        [
            {"prompt_embeds": np.zeros((3, 8))},
            {"prompt_token_ids": None, "prompt_embeds": np.zeros((3, 8))},
            {"mm_features": ["an image"]},
        ],
        ids=["mixed", "embeddings", "image"],
    )
    def test_what_is_no_token_ids(self, changes: dict) -> None:
        found = rows.prompt_of(new_request("a", [4, 5, 6], **changes))
        assert (found.length, found.tokens) == (3, None)

    def test_context_ends(self) -> None:
        cached = SimpleNamespace(req_ids=["b", "c"], num_computed_tokens=[40, 7])
        output = SimpleNamespace(
            scheduled_new_reqs=[new_request("a", [1] * 50, computed=32)],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={"c": 4, "a": 18, "b": 1},
        )
        assert rows.context_ends(output) == {"a": 50, "b": 41, "c": 11}


class FakeBatch:
    """The part of V1's InputBatch that the hooks read; test_batch.py has the real one."""

    def __init__(self, computed: int, prompt: int) -> None:
        self.num_reqs = 1
        self.req_ids = ["a"]
        self.num_prompt_tokens = np.array([prompt])
        self.num_tokens_no_spec = np.array([prompt])
        self.num_computed_tokens_cpu = np.array([computed])


class TestWorkerHooks:
    def make(self, runner: Any) -> tuple[Any, mock.Mock, list[str]]:
        events: list[str] = []
        runtime = mock.Mock()
        runtime.prompts_may_be_due.return_value, runtime.is_warming_up = True, False
        runtime.admit.side_effect = lambda prompts: events.append(
            f"admit {[prompt.request_id for prompt in prompts]}"
        )
        runtime.decide_due.side_effect = lambda ends: events.append(f"decide {ends}")
        runtime.finish.side_effect = lambda ids: events.append(f"finish {sorted(ids)}")
        runtime.begin_step.side_effect = lambda context: events.append(
            f"begin {context.request_ids}"
        )
        runtime.end_step.side_effect = lambda: events.append("end")
        runtime.warm_up.side_effect = lambda runner: events.append("kernels")
        runtime.abandon_step.side_effect = lambda: events.append("abandon")
        worker = SimpleNamespace(model_runner=runner, events=events)
        worker.execute_model = lambda output: runner.execute(output)
        worker.sample_tokens = lambda grammar: events.append(f"sample {grammar}")
        worker.compile_or_warm_up_model = lambda: events.append(f"warm {runtime.is_warming_up}")
        worker_hooks.hook_worker(worker, runtime)
        return worker, runtime, events

    def runner_v1(self, computed: int = 0, prompt: int = 9) -> SimpleNamespace:
        runner = SimpleNamespace(input_batch=FakeBatch(computed, prompt))
        runner._build_attention_metadata = lambda *args, **kwargs: (args, kwargs)
        runner._is_uniform_decode = lambda *args, **kwargs: True

        def execute(output: Any) -> None:
            found = runner._build_attention_metadata(
                num_reqs=1, num_scheduled_tokens=output.num_scheduled_tokens
            )
            assert found == ((), {"num_reqs": 1, "num_scheduled_tokens": {"a": 9}})

        runner.execute = execute
        return runner

    OUTPUT = SimpleNamespace(
        finished_req_ids={"z"},
        num_scheduled_tokens={"a": 9},
        scheduled_new_reqs=[new_request("a", [5] * 12, computed=3)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
    )
    BEFORE: ClassVar[list[str]] = ["finish ['z']", "admit ['a']", "decide {'a': 12}"]

    def test_order_of_a_step(self) -> None:
        worker, _, events = self.make(self.runner_v1())
        assert worker.execute_model(self.OUTPUT) is None
        assert worker.sample_tokens("grammar") is None
        assert events == [*self.BEFORE, "begin ('a',)", "sample grammar", "end"]

    @pytest.mark.parametrize("free_kv", [True, False])
    def test_decided_routes_go_with_the_output(self, free_kv: bool) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        from flux_vllm.kv.channel import decided_routes

        worker = SimpleNamespace(model_runner=self.runner_v1(), execute_model=None)
        worker.compile_or_warm_up_model = None
        output, runtime = ModelRunnerOutput(["a"], {"a": 0}), mock.Mock()
        runtime.config.free_kv = free_kv
        runtime.end_step.return_value.by_request.return_value = {"a": [0, 1]}
        worker.sample_tokens = lambda grammar: output
        worker_hooks.hook_worker(worker, runtime)
        assert worker.sample_tokens("grammar") is output
        assert decided_routes(output) == ({"a": [0, 1]} if free_kv else {})

    def test_nothing_open_nothing_decided(self) -> None:
        worker, runtime, events = self.make(self.runner_v1())
        runtime.prompts_may_be_due.return_value = False
        worker.execute_model(self.OUTPUT)
        assert events == [*self.BEFORE[:2], "begin ('a',)"]

    def test_error_in_a_probe_abandons_the_step(self) -> None:
        worker, runtime, events = self.make(self.runner_v1())
        runtime.decide_due.side_effect = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            worker.execute_model(self.OUTPUT)
        assert events == [*self.BEFORE[:2], "abandon"]

    def test_warm_up_is_known_while_it_lasts(self) -> None:
        worker, runtime, events = self.make(self.runner_v1())
        worker.compile_or_warm_up_model()
        assert events == ["kernels", "warm True"]
        runtime.end_warm_up.assert_called_once_with()

    @pytest.mark.parametrize(
        ("arguments", "captured"),
        [({}, 1), ({"profile_only": False}, 1), ({"profile_only": True}, 0)],
    )
    def test_probe_is_captured_after_vllms_graphs(self, arguments, captured) -> None:
        runner = self.runner_v1()
        runner.capture_model = mock.Mock(return_value=77)
        original = runner.capture_model
        _, runtime, _ = self.make(runner)
        runtime.probe.capture.side_effect = lambda: original.assert_called_once_with(**arguments)
        assert runner.capture_model(**arguments) == 77
        assert runtime.probe.capture.call_count == captured

    def test_policy_without_a_probe(self) -> None:
        runner = self.runner_v1()
        runner.capture_model = lambda: 77
        _, runtime, _ = self.make(runner)
        runtime.probe = None
        assert runner.capture_model() == 77

    def test_step_without_tokens_ends_at_once(self) -> None:
        runner = self.runner_v1()
        worker, _, events = self.make(runner)
        runner.execute = lambda output: "nothing to sample"
        assert worker.execute_model(self.OUTPUT) == "nothing to sample"
        assert events == [*self.BEFORE, "end"]

    def test_error_in_sampling_abandons_the_step(self) -> None:
        worker, runtime, events = self.make(self.runner_v1())
        del worker.sample_tokens

        def fail(grammar: Any) -> None:
            raise KeyboardInterrupt

        worker.sample_tokens = fail
        worker_hooks.hook_worker(worker, runtime)
        with pytest.raises(KeyboardInterrupt):
            worker.sample_tokens(None)
        assert events == ["abandon"]

    def test_warm_up_is_no_step(self) -> None:
        runner = self.runner_v1()
        _, _, events = self.make(runner)
        runner._build_attention_metadata(num_tokens=3, num_reqs=1)
        assert events == []

    def test_error_abandons_the_step(self) -> None:
        runner = self.runner_v1()
        worker, _, events = self.make(runner)

        def fail(_output: Any) -> None:
            runner._build_attention_metadata(num_scheduled_tokens={"a": 9})
            raise KeyboardInterrupt

        runner.execute = fail
        with pytest.raises(KeyboardInterrupt):
            worker.execute_model(self.OUTPUT)
        assert events == [*self.BEFORE, "begin ('a',)", "abandon"]

    def test_collective_rpc(self) -> None:
        worker, runtime, _ = self.make(self.runner_v1())
        assert worker.flux_status is runtime.status
        assert worker.flux_fix_routes is runtime.fix_routes
        assert worker.flux_set_threshold is runtime.set_threshold

    @pytest.mark.parametrize(
        ("computed", "prompt", "forced", "uniform"),
        [
            (9, 9, None, True),
            (8, 9, None, False),  # the one-token tail of a prompt
            (8, 9, True, True),  # a dummy run says what it wants
        ],
    )
    def test_prefill_takes_no_decode_graph_v1(self, computed, prompt, forced, uniform) -> None:
        runner = self.runner_v1(computed, prompt)
        self.make(runner)
        found = runner._is_uniform_decode(
            max_num_scheduled_tokens=1,
            uniform_decode_query_len=1,
            num_tokens=1,
            num_reqs=1,
            force_uniform_decode=forced,
        )
        assert found is uniform

    def runner_v2(self, state: Any, uniform: int | None) -> SimpleNamespace:
        lengths = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([0, 9])))
        runner = SimpleNamespace(req_states=lengths)
        runner.gather_batch_req_state = lambda output, dummy_run: (state, uniform)
        runner.prepare_attn = lambda batch: ("tables", batch)
        return runner

    def test_step_v2(self) -> None:
        runner = self.runner_v2(None, None)
        _, _, events = self.make(runner)
        batch = SimpleNamespace(
            num_reqs=1,
            req_ids=["a"],
            idx_mapping_np=np.array([1]),
            num_computed_tokens_np=np.array([0]),
            num_scheduled_tokens=np.array([9]),
            prefill_len_np=np.array([9]),
        )
        assert runner.prepare_attn(batch) == ("tables", batch)
        assert events == ["begin ('a',)"]

    @pytest.mark.parametrize(
        ("has_prefill", "eligible", "uniform"),
        [(False, True, 1), (True, False, None)],
        ids=["decodes", "one-token-tail"],
    )
    def test_prefill_takes_no_decode_graph_v2(self, has_prefill, eligible, uniform) -> None:
        from vllm.v1.worker.gpu.model_runner import BatchReqState

        fields = dict.fromkeys(BatchReqState._fields)
        fields |= {"has_prefill": has_prefill, "decode_graph_eligible": True}
        runner = self.runner_v2(BatchReqState(**fields), 1)
        self.make(runner)
        state, found = runner.gather_batch_req_state(None, dummy_run=False)
        assert (state.decode_graph_eligible, found) == (eligible, uniform)

    def test_dummy_batch_v2(self) -> None:
        runner = self.runner_v2(None, 4)
        self.make(runner)
        assert runner.gather_batch_req_state(None, dummy_run=True) == (None, 4)
