"""The suite's list, its page and its runner.

Oracle: the folder's files; a subprocess that is not started.
"""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as program
from benchmarks.suite import SHAPE, SUITE

FOLDER = Path(program.__file__).parent
PAGE = (FOLDER / "README.md").read_text()


def test_every_command_is_in_the_suite_and_on_the_page() -> None:
    files = [*FOLDER.glob("*.py"), *(FOLDER / "experiments").glob("*.py")]
    commands = {
        ".".join(file.relative_to(FOLDER).with_suffix("").parts)
        for file in files
        if file.name != "__main__.py" and '\nif __name__ == "__main__"' in file.read_text()
    }
    no_benchmarks = {"plot_serve", "timed_answers"}
    named = {benchmark.module for benchmark in SUITE}
    assert commands - no_benchmarks == named - {"real_tasks"}
    for benchmark in SUITE:
        assert f"| `{benchmark.module}`" in PAGE
        assert not benchmark.page or (FOLDER / "results" / benchmark.page).is_file()


def test_a_shape_is_a_model_without_weights() -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(SHAPE)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert [file.name for file in SHAPE.iterdir()] == ["config.json"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SUITE)


def test_run_runs_what_the_machine_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        started.append(command[1:])
        return SimpleNamespace(returncode="bench_overhead" in command[2])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(program, "machine", lambda: "cpu")
    assert program.main(["run", "--out", str(tmp_path / "out")]) == 1  # one failed
    (command,) = started
    assert command[:3] == ["-m", "benchmarks.bench_overhead", "--model"]
    assert command[-2:] == ["--out", str(tmp_path / "out" / "bench_overhead.json")]
    monkeypatch.setattr(program, "machine", lambda: "gpu")
    assert program.main(["run", "--only", "bench_plans", "--out", str(tmp_path)]) == 0
    assert started[-1][1] == "benchmarks.bench_plans"
    with pytest.raises(ValueError, match=r"found \['bench_free_kv'\]"):
        program.main(["run", "--only", "bench_free_kv", "--out", str(tmp_path)])
