"""Which backend a drafter's attention gets: vLLM's own, from either model runner.

Oracle: the configuration that vLLM's real loaders, of both runners, hand to `get_model`. Pinned:
model runner V2 takes the engine's backend where the drafter's is not named, and for a draft model
also where it is.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from flux_vllm.hooks import worker as worker_hooks
from flux_vllm.startup.drafter import choose_drafter_backend
from tests.helpers.drafters import write_drafter, write_target
from tests.unit.startup.fakes import make_config, make_speculation

pytestmark = pytest.mark.vllm


class _LoadError(Exception):
    """Stands in for the model, with the configuration that it was to be made of."""

    def __init__(self, vllm_config: Any) -> None:
        self.backend = vllm_config.attention_config.backend


def _get_model(*, vllm_config: Any, **_: Any) -> None:
    raise _LoadError(vllm_config)


def _v1_draft_model(config: Any) -> None:
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    _of(DraftModelProposer, config)._get_model()


def _v1_head(config: Any) -> None:
    from vllm.v1.spec_decode.eagle import EagleProposer

    _of(EagleProposer, config)._get_model()


def _v2_draft_model(config: Any) -> None:
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

    worker_hooks.install()
    speculator = _of(StandaloneARSpeculator, config)
    try:
        speculator.load_draft_model(None, set())
    finally:
        assert speculator.vllm_config is config


def _v2_head(config: Any) -> None:
    from vllm.v1.worker.gpu.spec_decode.eagle import utils

    with mock.patch.object(utils, "get_pp_safe_draft_load_config", side_effect=lambda own: own):
        utils.load_eagle_model(None, config)


def _of(kind: type, config: Any) -> Any:
    proposer = object.__new__(kind)
    proposer.vllm_config, proposer.speculative_config = config, config.speculative_config
    proposer.draft_model_config = config.speculative_config.draft_model_config
    return proposer


LOADERS = {
    "v1-draft_model": ("vllm.v1.spec_decode.draft_model", _v1_draft_model),
    "v1-eagle": ("vllm.v1.spec_decode.llm_base_proposer", _v1_head),
    "v2-draft_model": ("vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator", _v2_draft_model),
    "v2-eagle": ("vllm.v1.worker.gpu.spec_decode.eagle.utils", _v2_head),
}


@pytest.fixture(scope="module", params=["draft_model", "eagle"])
def configuration(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Callable:
    """Make engines' configurations by vLLM's own EngineArgs, whose backend is given."""
    from vllm import EngineArgs

    folder = tmp_path_factory.mktemp(request.param)
    model = write_target(folder / "model", request.param)
    drafting = write_drafter(folder / "drafter", request.param)

    def make(backend: str) -> Any:
        arguments = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=256,
            attention_backend=backend,
            additional_config={"flux": {"policy": "full"}} if backend == "flux" else {},
            speculative_config=drafting,
        )
        return arguments.create_engine_config()

    make.method = request.param  # type: ignore[attr-defined]
    return make


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("backend", ["flux", "cpu_attn"])
def test_drafters_attend_by_vllms_own_backend(
    configuration: Callable, backend: str, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(backend)
    assert config.attention_config.backend.name == backend.upper()
    named = config.speculative_config.attention_backend
    assert (named and named.name) == ("CPU_ATTN" if backend == "flux" else None)
    module, load = LOADERS[f"{runner}-{configuration.method}"]  # type: ignore[attr-defined]
    monkeypatch.setattr(f"{module}.get_model", _get_model)
    with pytest.raises(_LoadError) as loaded:
        load(config)
    found = loaded.value.backend
    if backend == "flux":
        assert found.name == "CPU_ATTN"
    else:  # untouched: V1 chooses anew, V2 takes the engine's
        assert (found and found.name) == (None if runner == "v1" else "CPU_ATTN")


@pytest.mark.parametrize(("device", "chosen"), [("cpu", "CPU_ATTN"), ("cuda", "FLASH_ATTN")])
def test_backend_by_device(tmp_path: Path, device: str, chosen: str) -> None:
    config = make_config(tmp_path, root__speculative_config=make_speculation("eagle"))
    config.device_config.device_type = device
    choose_drafter_backend(config)
    assert config.speculative_config.attention_backend.name == chosen


def test_the_operators_choice_stands(tmp_path: Path) -> None:
    speculative = make_speculation("eagle", backend="TRITON_ATTN")
    choose_drafter_backend(make_config(tmp_path, root__speculative_config=speculative))
    assert speculative.attention_backend == SimpleNamespace(name="TRITON_ATTN")
    choose_drafter_backend(make_config(tmp_path))  # no speculation
