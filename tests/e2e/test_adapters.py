"""LoRA adapters: a request's probe runs through its adapter, as its own forward does.

Oracle: tests/helpers/reference.py over weights into which the adapter was merged.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_vllm.router.place import beside_weights
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt
from tests.helpers.reference import ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import assert_routed

pytestmark = pytest.mark.vllm

BLOCK_SIZE, RANK = 32, 8
PROJECTIONS = ("q_proj", "v_proj")


def _write_adapter(folder: Path, model: Path, merged: Path) -> None:
    """Write a random adapter of queries and values, and the model with it merged in."""
    generator = torch.Generator().manual_seed(1)
    weights = load_file(model / "model.safetensors")
    adapter = {}
    for name in sorted(weights):
        if not any(part in name for part in PROJECTIONS):
            continue
        outputs, inputs = weights[name].shape
        down = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
        up = torch.randn(outputs, RANK, generator=generator) * RANK**-0.5
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        weights[name] = weights[name] + up @ down
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    merged.mkdir()
    shutil.copy(model / "config.json", merged)
    save_file(weights, merged / "model.safetensors", {"format": "pt"})


def test_a_probe_runs_through_the_requests_adapter(
    tiny_model, reference, reference_router, tmp_path
) -> None:
    from vllm.lora.request import LoRARequest

    _write_adapter(tmp_path / "adapter", tiny_model, tmp_path / "merged")
    merged = ReferenceModel(tmp_path / "merged")
    router = ReferenceRouter.load(beside_weights(tiny_model))
    adapter = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
    prompts = [random_prompt(length, seed=length) for length in (100, 161, 333, 640, 1000)]
    with Engine(
        tiny_model,
        {},
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=300,
        enable_lora=True,
        max_lora_rank=RANK,
    ) as engine:
        plain = engine.generate(prompts, 24)
        adapted = engine.generate(prompts, 24, adapter=adapter)
        again = engine.generate(prompts, 8)
    for own, other, without in zip(plain, adapted, again, strict=True):
        assert_routed(own, reference, reference_router, pattern)
        assert_routed(other, merged, router, pattern)
        assert (without.routes, without.p_full) == (own.routes, own.p_full)
    assert [a.routes for a in plain] != [a.routes for a in adapted]
