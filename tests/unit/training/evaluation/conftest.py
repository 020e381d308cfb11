"""An evaluation of a tiny model, small enough to run whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flux_vllm.router.checkpoint import RouterInfo, write_router
from training.attach import RoutedModel
from training.config import DataSettings, EvalConfig, SystemSettings
from training.evaluation import evaluate as module
from training.evaluation import prompts as prompts_module


@pytest.fixture
def config(
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> EvalConfig:
    info = RouterInfo(
        base_model="tiny",
        num_layers=4,
        head_dim=8,
        pool_tokens=16,
        probe=(16, 32),
        pools=("tail:16", "head:8"),
        context_layers=(3,),
        widths=(8, 8, 8, 8),
        sink_tokens=8,
        window_tokens=32,
        provenance={"config": {"seed": 7}},
    )
    write_router(tmp_path, info.make_router(), info)
    routed = RoutedModel(tiny_model(), 8, 32)
    monkeypatch.setattr(module, "load_routed", lambda *arguments: routed)
    monkeypatch.setattr(module, "load_tokenizer", lambda model: tokenizer)
    monkeypatch.setattr(prompts_module, "load_tokenizer", lambda model: tokenizer)
    limit = routed.config.max_position_embeddings
    monkeypatch.setattr(prompts_module, "model_limit", lambda model: limit)
    return EvalConfig(
        model="tiny",
        router=str(tmp_path),
        out=str(tmp_path / "out"),
        data=DataSettings(tasks=("needle", "repeat_end"), corpus=str(corpus), workers=0),
        lengths=(256, 320),
        prompts=3,
        validation_prompts=2,
        validation_lengths=(256,),
        thresholds=(0.3, 0.5, 0.7),
        random_patterns=2,
        variants=("plain", "begun", "wording", "wrapper:plain"),
        variant_prompts=2,
        system=SystemSettings(device="cpu", dtype="float32"),
    )
