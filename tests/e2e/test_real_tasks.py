"""Evaluation on real tasks, the whole command, on real servers.

Oracle: with all layers FULL flux is full attention, so its answers agree with vLLM's own backend;
other routes are those that the variant asks for, in flux's own log.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_tasks import cli
from flux_vllm.router.place import beside_weights

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.long]

WORDS = "The quick brown fox jumps over the lazy dog and runs along the river bank at dawn. "


def _sample(task: str, at: int, prompt: str, answer: str, chat: bool) -> str:
    fields = {"task": task, "id": f"{task}-{at}", "prompt": prompt, "answers": [answer]}
    return json.dumps(fields | {"max_new_tokens": 8, "chat": chat})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts beyond the router's sink and window of 576 tokens, and a short one."""
    folder = tmp_path_factory.mktemp("real_tasks")
    question = f"{WORDS * 25}The code is 4711. {WORDS * 15}\nWhat is the code?"
    lines = [
        _sample("qasper", 0, question, "4711", chat=True),
        _sample("lcc", 0, "def one():\n    return 1\n\n" * 90, "def one():", chat=False),
        _sample("qasper", 1, "Which animal jumps over the dog?", "the fox", chat=True),
    ]
    (folder / "longbench_dev.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _run(model: Path, folder: Path, *variants: str) -> dict[str, dict[str, Any]]:
    """Run the command in a folder that the tests share, so that full attention answers once."""
    flags = [part for text in ("cpu_attn", *variants) for part in ("--variant", text)]
    status = cli.main(
        ["run", "--model", str(model), "--eval", str(folder), "--out", str(folder / "run"),
         "--tasks", "longbench", *flags, "--seed", "1", "--dtype", "float32",
         "--flux", json.dumps({"router": str(beside_weights(model))}),
         "--max-model-len", "2048", "--chunk", "256", "--max-num-seqs", "4", "--at-once", "3",
         "--runner", "v1", "--kv-gib", "0.25", "--server-arguments", "--enforce-eager"]
    )  # fmt: skip
    assert status == 0
    rows = json.loads((folder / "run" / "real_tasks.json").read_text())
    for row in rows:
        assert row["longbench_full"] == rows[0]["longbench"]
        assert row["agreement"]["longbench"]["prompts"] == 3
    return {row["label"]: row for row in rows}


def test_fixed_routes_beside_full_attention(sample_model: Path, folder: Path) -> None:
    rows = _run(sample_model, folder, "full", "sparse")
    agreement = {label: row["agreement"]["longbench"] for label, row in rows.items()}
    for label in ("cpu_attn", "full"):
        assert rows[label]["sparse_share"] == 0.0
        assert agreement[label]["equal_tokens"] == 1.0
        assert agreement[label]["kl"] < 1e-5
    assert rows["sparse"]["sparse_share"] == 1.0
    assert agreement["sparse"]["kl"] > 1e-4
    curve = folder / "run" / "real_tasks_SmolLM2-135M-Instruct_curve.png"
    assert curve.stat().st_size > 1000


def test_thresholds_of_one_engine(sample_model: Path, folder: Path) -> None:
    router = f"own=router:{beside_weights(sample_model)}@0.02,0.7"
    rows = _run(sample_model, folder, router)
    assert 0 <= rows["own-t0.02"]["sparse_share"] < rows["own-t0.7"]["sparse_share"] < 1
    assert (rows["own-t0.7"]["seed"], rows["own-t0.7"]["threshold"]) == (1, 0.7)
