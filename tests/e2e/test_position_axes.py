"""Models whose positions have several axes (M-RoPE), which a text counts alike.

vLLM 0.32 drops the axes of Qwen3.5's text-only class; that of its checkpoints, which take images,
has them. Oracles: see tests/helpers/families.py; for Qwen2.5-VL and Qwen3-VL the reference is plain
Qwen2 and Qwen3, which know one axis.
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen3_5TextConfig, Qwen3Config

from tests.e2e.test_layer_kinds import DELTA_NET
from tests.helpers.families import (
    Family,
    check_fixed_routes,
    check_full,
    check_router,
    check_training,
    make_case,
)
from tests.helpers.watched_probes import around_probes

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

AXES = 3
NO_IMAGES = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = Family(
    Qwen3_5TextConfig,
    {
        **DELTA_NET,
        "rope_parameters": ROPE
        | {"partial_rotary_factor": 0.5, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    },
    dtype="bfloat16",
    lengths=(100, 161, 333, 700),  # its KV blocks are of 640 tokens
    head_dim=64,
    takes_images=True,
    arguments=NO_IMAGES,
)
# vLLM's CPU kernels of linear attention know bfloat16 alone. Without such layers float32 is served,
# and errors are told from rounding. What layers there are, vLLM asks the outer configuration.
ALL_FULL = {"layer_types": ["full_attention"] * 4}
ATTENTION_ALONE = replace(
    HYBRID,
    config=HYBRID.config | ALL_FULL,
    routed=(0, 1, 2, 3),
    sparse=(0, 3),
    dtype="float32",
    arguments=HYBRID.arguments | {"hf_overrides": ALL_FULL},
)
TEXT_CLASS = replace(HYBRID, takes_images=False, arguments={})
QWEN2_5_VL = Family(
    Qwen2Config,
    {"rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}},
    routed=(0, 1, 2, 3),
    sparse=(0, 3),
    takes_images=True,
    arguments=NO_IMAGES,
)
QWEN3_VL = replace(
    QWEN2_5_VL,
    config_class=Qwen3Config,
    config={"rope_parameters": ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}},
)
FAMILIES = {
    "qwen2.5-vl": QWEN2_5_VL,
    "qwen3-vl": QWEN3_VL,
    "qwen3.5": HYBRID,
    "qwen3.5-attention-alone": ATTENTION_ALONE,
    "qwen3.5-text-class": TEXT_CLASS,
}


@pytest.mark.parametrize(
    "name",
    [
        "qwen2.5-vl",
        "qwen3-vl",
        "qwen3.5-attention-alone",
        pytest.param("qwen3.5", marks=pytest.mark.long),
        pytest.param("qwen3.5-text-class", marks=pytest.mark.long),
    ],
)
def test_several_position_axes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On text. In a process of its own, where torchvision may be a stand-in.

    vLLM's code of the model imports it for images, and installations for the CPU lack it.
    """
    if find_spec("torchvision") is None:
        _write_torchvision(tmp_path / "stand-in")
        monkeypatch.syspath_prepend(tmp_path / "stand-in")  # the process takes it over,
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # and hands it on
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(_check_all, FAMILIES[name], tmp_path / "model").result()


def _check_all(family: Family, folder: Path) -> None:
    case = make_case(family, folder)
    check_full(case)
    check_fixed_routes(case)
    with _probed_positions(family.takes_images) as probed:
        check_router(case)
    assert len(probed) >= len(family.lengths)
    for positions in probed:
        assert positions.shape[:-1] == ((AXES,) if family.takes_images else ())
        assert (positions == positions.view(-1, positions.shape[-1])[0]).all()
    assert max(positions.max() for positions in probed) == max(family.lengths) - 1
    check_training(case)


@contextmanager
def _probed_positions(has_axes: bool) -> Iterator[list[torch.Tensor]]:
    """Keep the positions that vLLM's model is given in each probe: [axes, tokens], or [tokens].

    Args:
        has_axes: what vLLM is to say of the model.
    """
    probed: list[torch.Tensor] = []

    def keep(_model: Any, _arguments: Any, named: dict[str, Any]) -> None:
        probed.append(named["positions"].clone())

    @contextmanager
    def watch(model_call: Any) -> Iterator[None]:
        assert model_call._vllm_config.model_config.uses_mrope == has_axes
        hook = model_call._runner.get_model().register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    with around_probes(watch):
        yield probed


def _write_torchvision(folder: Path) -> None:
    """Write modules that have every name, and do nothing."""
    everything = """
from enum import Enum

__version__ = "0"


class InterpolationMode(Enum):
    NEAREST, NEAREST_EXACT, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = range(7)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__getattr__": lambda self, name: None})
"""
    modules = ("__init__", "io", "transforms/__init__", "transforms/functional")
    for module in (*modules, "transforms/v2/__init__", "transforms/v2/functional"):
        path = folder / "torchvision" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(everything)
