"""How a model runner's model is called beside its batches.

Oracle: calls recorded by fakes of vLLM's parts. The real ones run in tests/e2e
(test_router_routes.py) on the CPU and in tests/gpu (test_probe.py) on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch

from flux_vllm.routing.model_call import RunnerModelCall
from flux_vllm.routing.probe import ProbeDone

pytestmark = pytest.mark.vllm

PARTITION, NVTX = "use_inductor_graph_partition", "enable_layerwise_nvtx_tracing"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS, POSITIONS = torch.tensor([5, 6, 0], dtype=torch.int32), torch.tensor([0, 90, 0])


def config(
    mode: str = "FULL_AND_PIECEWISE", lora: bool = False, stages: int = 1, **model: bool
) -> Any:
    flags = {"supports_multimodal_inputs": False, "enable_prompt_embeds": False}
    flags |= {"uses_mrope": False, "mrope_num_dims": 3}
    return SimpleNamespace(
        model_config=SimpleNamespace(**flags | model),
        lora_config=object() if lora else None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(name=mode), use_inductor_graph_partition=False
        ),
        observability_config=SimpleNamespace(enable_layerwise_nvtx_tracing=False),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )


class Stage:
    """One of vLLM's pipeline stages, with what it gets and what it sends."""

    def __init__(self, number: int, stages: int) -> None:
        self.world_size = stages
        self.is_first_rank, self.is_last_rank = number == 0, number == stages - 1
        self.sent: list[Any] = []

    def recv_tensor_dict(self) -> dict[str, torch.Tensor]:
        return {"hidden_states": torch.ones(3, 2)}

    def isend_tensor_dict(self, tensors: Any) -> None:
        self.sent.append(tensors)


class NoStates(dict):
    """A model of attention layers alone."""

    metadata: ClassVar[dict] = {}
    apart = staticmethod(nullcontext)


def call(model: Any, vllm_config: Any, stage: Stage | None = None) -> mock.Mock:
    """Call a model. Returns: what set_forward_context was called with."""
    runner = SimpleNamespace(get_model=lambda: model)
    with (
        mock.patch("vllm.forward_context.set_forward_context") as context,
        mock.patch("vllm.distributed.get_pp_group", return_value=stage or Stage(0, 1)),
    ):
        RunnerModelCall(runner, vllm_config, NoStates(), CPU)(
            {"layer": "metadata"}, TOKENS, POSITIONS
        )
    return context


def test_tokens_without_slots_or_graphs() -> None:
    model, vllm_config = mock.Mock(), config()
    context = call(model, vllm_config)
    # No slot mapping: nothing is written. No mode: no graph of vLLM's.
    context.assert_called_once_with({"layer": "metadata"}, vllm_config, num_tokens=3)
    model.assert_called_once_with(
        input_ids=TOKENS, positions=POSITIONS, intermediate_tensors=None, inputs_embeds=None
    )


def test_model_with_several_position_axes() -> None:
    """As rows of a buffer as long as vLLM's, for whose strides it is compiled."""
    model = mock.Mock()
    context = call(model, config(uses_mrope=True))
    positions = model.call_args.kwargs["positions"]
    assert positions.tolist() == [POSITIONS.tolist()] * 3
    assert (positions.stride(), positions.dtype) == ((513, 1), torch.int64)
    assert context.call_args.kwargs["num_tokens"] == 3


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("flags", [{}, {"enable_prompt_embeds": True}], ids=["ids", "embeddings"])
def test_hidden_states_travel_from_stage_to_stage(number: int, flags: dict[str, bool]) -> None:
    output = SimpleNamespace(tensors={"hidden_states": torch.zeros(3, 2)})
    model, stage = mock.Mock(return_value=output), Stage(number, 3)
    call(model, config(stages=3, **flags), stage)
    received = model.call_args.kwargs["intermediate_tensors"]
    if number == 0:
        assert received is None
    else:
        assert received["hidden_states"].tolist() == torch.ones(3, 2).tolist()
    # Embeddings are the first stage's alone.
    assert model.embed_input_ids.called == (number == 0 and bool(flags))
    assert stage.sent == ([] if number == 2 else [output.tensors])


class Guards(NoStates):
    """What a call is in the midst of, by name."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.entered.append(name)
        try:
            yield
        finally:
            self.entered.remove(name)

    def apart(self) -> Any:
        return self.within("states")


@pytest.mark.parametrize("error", [ProbeDone, RuntimeError])
def test_a_layer_that_ends_the_call_leaves_context_and_states(error: type[BaseException]) -> None:
    guards, seen = Guards(), []

    def model(**_: Any) -> None:
        seen.extend(guards.entered)
        raise error

    runner = SimpleNamespace(get_model=lambda: model)
    with (
        mock.patch(
            "vllm.forward_context.set_forward_context", return_value=guards.within("context")
        ),
        mock.patch("vllm.distributed.get_pp_group", return_value=Stage(0, 1)),
        nullcontext() if error is ProbeDone else pytest.raises(error),
    ):
        RunnerModelCall(runner, config(), guards, CPU)({}, TOKENS, POSITIONS)
    assert seen == ["context", "states"]
    assert guards.entered == []


@pytest.mark.parametrize(
    ("change", "can"),
    [
        (lambda config: None, True),
        (lambda config: setattr(config.parallel_config, "pipeline_parallel_size", 2), False),
        (lambda config: setattr(config.compilation_config, PARTITION, True), False),
        (lambda config: setattr(config.observability_config, NVTX, True), False),
    ],
    ids=["plain", "stages", "partition", "ranges"],
)
def test_can_stop(change: Any, can: bool) -> None:
    vllm_config = config()
    change(vllm_config)
    assert RunnerModelCall(mock.Mock(), vllm_config, NoStates(), CPU).can_stop == can


def test_offloaded_weights_are_fetched_through_the_whole_model(monkeypatch) -> None:
    """Layers fetch for others that come later, the last ones for the first of the next step."""
    monkeypatch.setattr("vllm.model_executor.offloader.base._instance", mock.Mock())
    assert not RunnerModelCall(mock.Mock(), config(), NoStates(), CPU).can_stop


@pytest.mark.parametrize("flag", ["supports_multimodal_inputs", "enable_prompt_embeds"])
@pytest.mark.parametrize("raw", [False, True])
def test_model_that_is_compiled_for_embeddings(flag: str, raw: bool) -> None:
    model = mock.Mock(requires_raw_input_tokens=raw)
    call(model, config(**{flag: True}))
    model.embed_input_ids.assert_called_once_with(TOKENS)
    model.assert_called_once_with(
        input_ids=TOKENS if raw else None,
        positions=POSITIONS,
        intermediate_tensors=None,
        inputs_embeds=model.embed_input_ids.return_value,
    )


@pytest.mark.parametrize(
    ("adapter", "number"), [(SimpleNamespace(lora_int_id=7), 7), (None, 0)], ids=["one", "none"]
)
def test_adapter(adapter: Any, number: int) -> None:
    class Hashable(SimpleNamespace):
        __hash__ = object.__hash__

    given = None if adapter is None else Hashable(**vars(adapter))
    runner = mock.Mock()
    RunnerModelCall(runner, config(lora=True), NoStates(), CPU).use_adapter(given, 4)
    wanted = set() if given is None else {given}
    runner._set_active_loras.assert_called_once_with((number,), (number,) * 4, wanted)


def test_engine_without_adapters() -> None:
    runner = mock.Mock()
    RunnerModelCall(runner, config(), NoStates(), CPU).use_adapter(None, 4)
    runner._set_active_loras.assert_not_called()


@pytest.mark.parametrize(
    ("device", "mode", "lora", "states", "stages", "can"),
    [
        (CUDA, "FULL_AND_PIECEWISE", False, 0, 1, True),
        (CUDA, "NONE", False, 0, 1, False),  # --enforce-eager
        (CUDA, "FULL", True, 0, 1, False),
        (CUDA, "FULL", False, 3, 1, False),
        (CUDA, "FULL", False, 0, 2, False),
        (CPU, "FULL", False, 0, 1, False),
    ],
)
def test_can_be_captured(
    device: torch.device, mode: str, lora: bool, states: int, stages: int, can: bool
) -> None:
    layers = NoStates(zip(range(states), "abc", strict=False))
    model_call = RunnerModelCall(mock.Mock(), config(mode, lora, stages), layers, device)
    assert model_call.can_be_captured == can


def test_capture_as_vllm_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice before, so that nothing is compiled or allocated for the first time within."""
    events: list[str] = []

    @contextmanager
    def noted(name: str, value: Any = None) -> Iterator[Any]:
        events.append(f"+{name}")
        yield value
        events.append(f"-{name}")

    offloader = SimpleNamespace(
        sync_prev_onload=lambda: events.append("sync"),
        join_after_forward=lambda: events.append("join"),
    )
    stream, graph = object(), SimpleNamespace(replay=object())

    def captured(found: Any, pool: Any, stream: Any) -> Any:
        assert (found, pool, stream) == (graph, "pool", context.stream)
        return noted("graph")

    context = SimpleNamespace(stream=stream)
    parallel, pools = "vllm.distributed.parallel_state", "vllm.compilation.cudagraph_pool"
    monkeypatch.setattr(f"{parallel}.graph_capture", lambda device: noted("ranks", context))
    monkeypatch.setattr(f"{pools}.capture_pool", lambda pool, config: noted("pool", "pool"))
    monkeypatch.setattr("vllm.model_executor.offloader.base.get_offloader", lambda: offloader)
    platform = SimpleNamespace(get_global_graph_pool=lambda: "global")
    monkeypatch.setattr("vllm.platforms.current_platform", platform, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", captured)
    model_call = RunnerModelCall(mock.Mock(), config(), NoStates(), CUDA)
    assert model_call.capture(lambda: events.append("work")) is graph.replay
    within = ["+pool", "+graph", "work", "join", "-graph", "-pool"]
    assert events == ["+ranks", "work", "work", "sync", *within, "-ranks"]
