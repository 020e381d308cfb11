"""The script of a GPU session, against the command line's own parser and a stand-in for Python."""

import os
import shlex
import subprocess
from pathlib import Path

from training import cli, recipes
from training.__main__ import _parser

SCRIPT = Path(__file__).parents[3] / "training" / "gpu_session.sh"

STAND_IN = """#!/usr/bin/env bash
# Writes what each command would; a training fails once where FAIL names its seed.
[[ $1 == -c ]] && { [[ $2 != *device_count* ]] || echo "${GPUS:-1}"; exit 0; }
echo "$CUDA_VISIBLE_DEVICES: $*" >>"$LOG"
while [[ $# -gt 1 ]]; do
    case $1 in train|eval|join) kind=$1 ;; --out) out=$2 ;; --seed) seed=$2 ;; esac
    case $1 in --scores) scores=$2 ;; esac
    shift
done
case $kind in
    train) [[ ${FAIL:-} == "$seed" ]] && exit 1; touch "$out/flux_router.safetensors" ;;
    eval) mkdir -p "$out" "$scores"; touch "$out/quality.json" ;;
    join) touch "$out" ;;
esac
"""


def session(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(folder), "a model", "corpus.jsonl.xz"],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        check=False,
    )


def test_every_command_line_is_understood(tmp_path: Path) -> None:
    lines = session(tmp_path / "run", DRY_RUN="1").stdout.splitlines()
    assert not (tmp_path / "run").exists()
    assert lines.pop().startswith("done")
    outs, kinds = [], []
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["-m", "training"]
        arguments = _parser().parse_args(words[2:])
        kinds.append(arguments.command)
        outs.append(Path(arguments.out))
        if arguments.command == "train":
            assert arguments.recipe == "smollm2"
            config = cli.apply_flags(recipes.RECIPES[arguments.recipe](), arguments)
            assert config.optimizer.time_limit_s == 0
            assert config.system.resume
            assert config.data.open_fraction > 0.5
            assert config.model.endswith("/a model")
        elif arguments.command == "eval":
            settings = cli.apply_flags(recipes.evaluation(), arguments)
            at_400 = "prompts_400" in arguments.out
            assert settings.shares == ((0.6, 0.75) if at_400 else ())
            assert settings.variant_prompts == 50
            assert bool(settings.variants) == ("variants" in arguments.out)
            assert len(settings.data.tasks) == (7 if at_400 else 10)
            assert Path(settings.scores) == tmp_path / "run" / "stored_scores"
    assert kinds == ["train"] * 3 + ["eval", "eval", "eval", "join"] * 3
    assert len(set(outs)) == len(outs)
    assert all(tmp_path / "run" in out.parents for out in outs)


def test_a_session_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    given = {"PYTHON": str(python), "LOG": str(log)}
    run = tmp_path / "run"
    failed = session(run, FAIL="1", **given)
    assert failed.returncode == 1
    assert "train failed: see" in failed.stderr
    assert "eval" not in log.read_text()
    assert (run / "seed1.tar.gz").exists()
    assert session(run, **given).stdout.startswith("done")
    lines = log.read_text().splitlines()
    assert [line.split()[3] for line in lines].count("train") == 4
    packed = {*(f"seed{at}.tar.gz" for at in range(3)), "stored_scores.tar.gz"}
    assert {path.name for path in run.glob("*.tar.gz")} == packed
    session(run, **given)
    assert log.read_text().splitlines() == lines
    (run / "prompts_400.json").unlink()
    session(run, **given)
    assert len(log.read_text().splitlines()) == len(lines) + 4


def test_gpus_share_the_seeds(tmp_path: Path) -> None:
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    given = {"PYTHON": str(python), "LOG": str(log), "GPUS": "2", "CUDA_VISIBLE_DEVICES": "3,5"}
    assert session(tmp_path / "run", **given).returncode == 0
    lines = [line for line in log.read_text().splitlines() if " join " not in line]
    gpus = {(line.split("/seed")[1][0], line[0]) for line in lines}
    assert gpus == {("0", "3"), ("1", "5"), ("2", "3")}
    assert len(lines) == 3 + 9


def test_arguments_are_asked_for() -> None:
    found = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "usage: training/gpu_session.sh FOLDER MODEL CORPUS" in found.stderr
