"""The command line: engines side by side, and what each is told.

Oracle: the commands' own parsers.
"""

import fcntl
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_tasks import cli
from benchmarks.real_tasks.samples import read_samples


def test_side_by_side_gives_each_device_its_share() -> None:
    code = "import os, sys; sys.exit(int(os.environ['CUDA_VISIBLE_DEVICES']))"
    commands = [[sys.executable, "-c", code]] * 3
    first, second, third = cli.run_side_by_side(commands, 2, ["0", "5"])
    assert {first, second} == {0, 5}
    assert third in (0, 5)
    assert cli.run_side_by_side(commands, 1, ["0", "5"]) == [0, 0, 0]


def test_side_by_side_ends_what_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(command: Any, env: Any) -> "subprocess.Popen[bytes]":
        if begun:
            raise OSError("no more processes")
        begun.append(popen(command, env=env))
        return begun[0]

    monkeypatch.setattr(cli.subprocess, "Popen", start)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(OSError, match="no more processes"):
        cli.run_side_by_side([sleep, sleep], 2, [])
    assert begun[0].poll() == -signal.SIGTERM


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *variants: str) -> list[list[str]]:
    started: list[list[str]] = []

    def side_by_side(commands: Any, at_once: int, devices: Any) -> list[int]:
        started.extend(commands)
        return [0] * len(commands)

    monkeypatch.setattr(cli, "run_side_by_side", side_by_side)
    monkeypatch.setattr(cli.joining, "join", lambda folders: [])
    monkeypatch.setattr(cli.joining, "write", lambda rows, path: None)
    flags = [part for text in variants for part in ("--variant", text)]
    cli.main(["run", "--model", "m", "--eval", "e", "--out", str(tmp_path), *flags,
              "--flux", '{"sink_tokens": 64}', "--needle-tokens", "900", "1500", "--seed", "2",
              "--server-arguments", "--enforce-eager"])  # fmt: skip
    return started


def test_run_starts_an_engine_for_what_can_share_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = ["full", "router:a@0.3,0.7", "cpu_attn", "static:1,2"]
    commands = _run(tmp_path, monkeypatch, *variants)
    answers = [cli._parse(command[3:]) for command in commands]
    assert [answer.variant for answer in answers] == [
        ["cpu_attn"], ["full", "static:1,2"], ["router:a@0.3,0.7"],
    ]  # fmt: skip
    for answer in answers:
        assert answer.baseline_label == "cpu_attn"
        assert answer.flux == {"sink_tokens": 64}
        assert answer.needle_tokens == [900, 1500]
        assert answer.seed == 2
        assert answer.out == tmp_path
        assert answer.server_arguments == ["--enforce-eager"]


def test_run_wants_full_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected one of the variants .*, found none"):
        _run(tmp_path, monkeypatch, "full")


def test_answer_wants_variants_of_one_engine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected variants that share an engine"):
        cli.main(["answer", "--model", "m", "--eval", "e", "--out", str(tmp_path),
                  "--variant", "full", "--variant", "router:a@0.3"])  # fmt: skip


def test_needles_writes_a_file_that_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "needles.jsonl"
    cli.main(["needles", "--out", str(file), "--count", "5", "--tokens", "900", "1500"])
    found = read_samples(file)
    assert [one.id for one in found][:2] == ["hidden_value-0", "hidden_values-1"]
    assert found[0].answers[0] in found[0].prompt
    assert json.loads(file.read_text().split("\n")[0])["chat"] is True


def test_engines_that_share_a_gpu_are_timed_in_turn(tmp_path: Path) -> None:
    lock = tmp_path / "turn"
    timing = threading.Event()

    def time_engine() -> None:
        with cli._held(lock):
            timing.set()

    with lock.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=time_engine)
        thread.start()
        assert not timing.wait(0.2), "timed while another engine held the lock"
    thread.join(5)
    assert timing.is_set()
    with cli._held(None):
        pass
