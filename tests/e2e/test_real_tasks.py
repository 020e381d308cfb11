"""Evaluation on real tasks, the whole command, on real servers.

Oracle: with all layers FULL flux is full attention, so its answers agree with vLLM's own backend;
other routes are those that the variant asks for, in flux's own log.
"""

import json
from pathlib import Path

import pytest

from benchmarks.real_tasks import cli
from flux_vllm.router.checkpoint import ROUTER_FILE_NAME

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

WORDS = "The quick brown fox jumps over the lazy dog and runs along the river bank at dawn. "


def _sample(task: str, at: int, prompt: str, answer: str, chat: bool) -> str:
    fields = {"task": task, "id": f"{task}-{at}", "prompt": prompt, "answers": [answer]}
    return json.dumps(fields | {"max_new_tokens": 8, "chat": chat})


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two prompts beyond the router's sink and window of 576 tokens, and a short one."""
    folder = tmp_path / "eval"
    folder.mkdir()
    question = f"{WORDS * 25}The code is 4711. {WORDS * 15}\nWhat is the code?"
    lines = [
        _sample("qasper", 0, question, "4711", chat=True),
        _sample("lcc", 0, "def one():\n    return 1\n\n" * 90, "def one():", chat=False),
        _sample("qasper", 1, "Which animal jumps over the dog?", "the fox", chat=True),
    ]
    (folder / "longbench_dev.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_run_compares_variants_with_full_attention(
    sample_model: Path, tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    router = sample_model / ROUTER_FILE_NAME
    status = cli.main(
        ["run", "--model", str(sample_model), "--eval", str(tasks), "--out", str(out),
         "--tasks", "longbench", "--variant", "cpu_attn", "--variant", "full",
         "--variant", "sparse", "--variant", f"own=router:{router}@0.02,0.7",
         "--flux", json.dumps({"router": str(router)}), "--seed", "1", "--dtype", "float32",
         "--max-model-len", "2048", "--chunk", "256", "--max-num-seqs", "4", "--at-once", "3",
         "--runner", "v1", "--kv-gib", "0.25", "--server-arguments", "--enforce-eager"]
    )  # fmt: skip
    assert status == 0
    rows = {row["label"]: row for row in json.loads((out / "real_tasks.json").read_text())}
    assert set(rows) == {"cpu_attn", "full", "sparse", "own-t0.02", "own-t0.7"}
    agreement = {label: row["agreement"]["longbench"] for label, row in rows.items()}
    for label in ("cpu_attn", "full"):
        assert rows[label]["sparse_share"] == 0.0
        assert agreement[label]["equal_tokens"] == 1.0
        assert agreement[label]["kl"] < 1e-4
    assert rows["sparse"]["sparse_share"] == 1.0
    assert agreement["sparse"]["kl"] > 100 * agreement["full"]["kl"]
    assert 0 <= rows["own-t0.02"]["sparse_share"] < rows["own-t0.7"]["sparse_share"] < 1
    for row in rows.values():
        assert row["longbench_full"] == rows["cpu_attn"]["longbench"]
        assert row["agreement"]["longbench"]["prompts"] == 3
    assert (out / "real_tasks_SmolLM2-135M-Instruct_curve.png").stat().st_size > 1000
