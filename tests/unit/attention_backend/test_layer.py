"""Which layers of a KV cache group take part in routing.

Oracle: the layers written down by hand. Pinned: a worker that flux was never attached to does not
serve FULL in silence.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from flux_vllm.attention_backend.layer import bound_layers
from flux_vllm.errors import UnsupportedConfigurationError


def _layer(index: int | None, window: int | None = None) -> Any:
    binding = None if index is None else SimpleNamespace(layer=index)
    return SimpleNamespace(impl=SimpleNamespace(binding=binding), sliding_window=window)


def test_in_the_order_in_which_they_run() -> None:
    layers = {"a": _layer(7), "b": _layer(2), "windowed": _layer(None, 128), "other group": None}
    assert bound_layers(layers, ["a", "windowed", "b"]) == [layers["b"], layers["a"]]


def test_drafters_layers_are_passed_over() -> None:
    """They attend by a backend of vLLM's own, which knows of no binding."""
    drafter = SimpleNamespace(impl=SimpleNamespace(), sliding_window=None)
    layers = {"a": _layer(0), "drafter": drafter}
    assert bound_layers(layers, list(layers)) == [layers["a"]]


def test_group_of_sliding_windows() -> None:
    assert bound_layers({"a": _layer(None, 64)}, ["a"]) == []


def test_layer_that_was_missed() -> None:
    layers = {"a": _layer(0), "b": _layer(None), "c": _layer(None, 128), "d": _layer(None)}
    with pytest.raises(UnsupportedConfigurationError) as error:
        bound_layers(layers, list(layers))
    assert str(error.value).startswith(
        "--attention-backend flux: expected every layer with full attention to be bound to routes "
        "before the KV cache is made, found 2 that are not, b first; "
    )


@pytest.mark.vllm
def test_engine_whose_worker_hook_is_missing_does_not_start(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real engine on a worker that attaches nothing."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    import flux_vllm.attention_backend.backend  # noqa: F401 (installs the hooks)
    from tests.helpers.engine import Engine
    from tests.helpers.models import write_tiny_llama

    unhooked = CPUWorker.determine_available_memory.__wrapped__
    monkeypatch.setattr(CPUWorker, "determine_available_memory", unhooked)
    with pytest.raises(UnsupportedConfigurationError, match="found 2 that are not"):
        Engine(write_tiny_llama(tmp_path, layers=2), {"policy": "full"})
