"""Engines of GPU tests leave room on the GPU for those of other processes.

Oracle: what `vllm.LLM` is asked for, and the source of every GPU test.
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.engine import Engine

pytestmark = pytest.mark.vllm

FILES = sorted((Path(__file__).parents[1] / "gpu").glob("test_*.py"))
MOST_SHARE = 0.15


class _AskedError(Exception):
    """Carries what was asked for."""


@pytest.mark.parametrize("flux", [None, {"policy": "full"}], ids=["stock", "flux"])
def test_an_engine_takes_a_part_of_the_gpu(monkeypatch: pytest.MonkeyPatch, flux: Any) -> None:
    import vllm

    def ask(**arguments: Any) -> None:
        raise _AskedError(arguments)

    monkeypatch.setattr(vllm, "LLM", ask)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(_AskedError) as asked:
        Engine(Path("model"), flux)
    (arguments,) = asked.value.args
    assert arguments["gpu_memory_utilization"] <= MOST_SHARE
    assert arguments["kv_cache_memory_bytes"] > 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_gpu_test_asks_for_no_more(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):  # another way to an engine than `Engine`
            assert ast.unparse(node.func).split(".")[-1] not in ("LLM", "AsyncLLM")
        if isinstance(node, ast.Dict):
            asked = {ast.unparse(k): v for k, v in zip(node.keys, node.values, strict=True) if k}
            share = asked.get("'gpu_memory_utilization'")
            assert share is None or ast.literal_eval(share) <= MOST_SHARE
