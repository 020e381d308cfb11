"""Layers by how often they are FULL, and a file that says so.

Oracle: shares counted by hand.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flux_vllm.router import checkpoint
from flux_vllm.router.checkpoint import RouterInfo, read_router, write_router
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route
from training import freeing
from training.attach import RoutedModel
from training.config import DataSettings, OrderConfig, SystemSettings
from training.freeing import add_order, freeing_order


class _Written(LayerRouter):
    """A router whose P(FULL) are the features themselves."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers, 8, 1)

    def forward_all(self, pooled_query_features: torch.Tensor) -> torch.Tensor:
        probability = pooled_query_features[..., :1]
        return torch.cat([(1 - probability).log(), probability.log()], dim=-1)


def test_layers_that_are_seldom_full_come_first() -> None:
    probability = [
        [0.9, 0.9, 0.9, 0.1],  # FULL for three of four
        [0.49, 0.49, 0.49, 0.49],  # never, but nearly
        [0.5, 0.01, 0.01, 0.01],  # once
        [0.02, 0.02, 0.02, 0.02],  # never
    ]
    features = torch.tensor(probability)[..., None]
    assert freeing_order(_Written(4), features) == (3, 1, 2, 0)
    features[3, :2] = torch.nan  # FULL where it is served
    assert freeing_order(_Written(4), features) == (1, 2, 3, 0)


@pytest.fixture
def router(tmp_path: Path) -> Path:
    """A router whose first layers are FULL for all prompts, in 16 bits."""
    info = RouterInfo(
        base_model="tiny",
        num_layers=4,
        head_dim=8,
        pool_tokens=16,
        sink_tokens=16,
        window_tokens=64,
        always_sparse=(3,),
    )
    made = info.make_router().requires_grad_(False)
    made.linear("head.4")[0].zero_()
    bias = made.linear("head.4")[1]
    bias.zero_()
    bias[:, int(Route.FULL)] = torch.tensor([3.0, 2.0, -3.0, 5.0])
    return write_router(tmp_path, made, info, torch.float16)


@pytest.fixture
def config(
    router: Path,
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> OrderConfig:
    """Put the order into the router's own file."""
    lines = [
        {"messages": [{"role": "user", "content": f"word{at} " * 90}], "answer": "yes"}
        for at in range(12)
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(freeing, "load_tokenizer", lambda model: tokenizer)
    monkeypatch.setattr(freeing, "load_routed", lambda *given: RoutedModel(tiny_model(), 16, 64))
    return OrderConfig(
        model="tiny",
        router=str(router),
        out=str(tmp_path),
        data=DataSettings(files=(str(prompts),)),
        prompts=5,
        system=SystemSettings(device="cpu"),
    )


@pytest.mark.parametrize("folder", ["out", "."])
def test_add_order_changes_nothing_else(router: Path, config: OrderConfig, folder: str) -> None:
    """In a copy, or in the file itself."""
    before = {name: tensor.clone() for name, tensor in load_file(router).items()}
    path, order = add_order(replace(config, out=str(router.parent / folder)))
    assert order == (3, 2, 1, 0)
    assert (path == router) == (folder == ".")
    after = load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)
    info = read_router(path)[1]
    assert (info.freeing_order, info.always_sparse) == (order, (3,))


def test_add_order_that_fails_leaves_the_router(
    router: Path, config: OrderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, files = router.read_bytes(), set(router.parent.iterdir())

    def write_half(_tensors: Any, path: Path, **_metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", write_half)
    with pytest.raises(OSError, match="no space left"):
        add_order(config)
    assert router.read_bytes() == before
    assert set(router.parent.iterdir()) == files
