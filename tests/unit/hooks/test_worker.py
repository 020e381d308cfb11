"""What the hooks of a worker tell the runtime, step by step, and which graphs they keep from it.

Oracle: the order of calls, written down by hand.
"""

from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest

from flux_vllm.hooks import worker as worker_hooks
from tests.unit.hooks.step_batches import new_request

pytestmark = pytest.mark.vllm


class FakeBatch:
    """The part of V1's InputBatch that the hooks read; test_rows.py has the real one."""

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

    @pytest.mark.parametrize(
        ("free_kv", "needs_router"), [(True, True), (False, True), (True, False)]
    )
    def test_decided_routes_go_with_the_output(self, free_kv: bool, needs_router: bool) -> None:
        """To schedulers that wait for them: clusters of other policies are SPARSE for all."""
        from vllm.v1.outputs import ModelRunnerOutput

        from flux_vllm.kv.channel import decided_routes

        worker = SimpleNamespace(model_runner=self.runner_v1(), execute_model=None)
        worker.compile_or_warm_up_model = None
        output, runtime = ModelRunnerOutput(["a"], {"a": 0}), mock.Mock()
        runtime.config.free_kv, runtime.config.needs_router = free_kv, needs_router
        runtime.end_step.return_value.by_request.return_value = {"a": [0, 1]}
        worker.sample_tokens = lambda grammar: output
        worker_hooks.hook_worker(worker, runtime)
        assert worker.sample_tokens("grammar") is output
        assert decided_routes(output) == ({"a": [0, 1]} if free_kv and needs_router else {})

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
