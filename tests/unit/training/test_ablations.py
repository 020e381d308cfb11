"""Ablations against the command line's own parser, a stand-in for Python, and a tiny model."""

import dataclasses
import json
import shlex
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from training import __main__ as command_line
from training import ablations, cli, recipes
from training import trainer as trainer_module
from training.ablations import LEFT_OUT, PASSES, AblationConfig, changes, run_ablations
from training.data.families import FAMILIES
from training.evaluation import evaluate as evaluate_module
from training.model_loading import AutoModelForCausalLM

STAND_IN = """#!/usr/bin/env bash
# Writes what each command would; the variant that FAIL holds fails, the one that SLOW holds hangs.
echo "$*" >>"$0.log"
kind=$3
while [[ $# -gt 1 ]]; do
    [[ $1 == --out ]] && out=$2
    shift
done
[[ $out == */$(cat "$0.fail" 2>/dev/null) ]] && exit 1
[[ $out == */$(cat "$0.slow" 2>/dev/null) ]] && exec sleep 60
if [[ $kind == train ]]; then
    touch "$out/flux_router.safetensors"
else
    mkdir -p "$out"
    cp "$0.json" "$out/quality.json"
    cp "$0.npz" "$out/scores.npz"
fi
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a stand-in in Python's place; its commands lie in `python.log`."""
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    training = {"steps": 3, "seconds": 1.5}
    asked = {"seed": 1, "lengths": [256], "prompts_per_cell": 4, "corpus_sha256": "c"}
    report = {"provenance": asked | {"router": {"training": training}}}
    (tmp_path / "python.json").write_text(json.dumps(report))
    tasks = np.repeat(["needle", "multi_key", "list_end"], 4)
    half = np.resize([1.0, 0.0], 12).astype(np.float32)
    np.savez(
        tmp_path / "python.npz",
        task=tasks,
        length=np.full(12, 256),
        full=np.ones(12, dtype=np.float32),
        **{"router@0.5": half, "share@0.5": half},  # type: ignore[arg-type]
    )
    monkeypatch.setattr(ablations.sys, "executable", str(path))
    return path


def kinds(python: Path) -> list[str]:
    return [line.split()[2] for line in python.with_name("python.log").read_text().splitlines()]


def test_every_command_line_is_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AblationConfig(
        model="a model", out=str(tmp_path / "run"), corpus="c.xz", dry_run=True, train_seconds=77
    )
    run_ablations(config)
    assert not (tmp_path / "run").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop().startswith("done")
    names = [*changes(recipes.smollm2())]
    assert len(lines) == len(names) * (1 + len(PASSES)) == 36
    outs = []
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["-m", "training"]
        arguments = command_line._parser().parse_args(words[2:])
        outs.append(Path(arguments.out).relative_to(tmp_path / "run"))
        if arguments.command == "train":
            trained = cli.apply_flags(recipes.RECIPES[arguments.recipe](), arguments)
            assert trained.optimizer.time_limit_s == 77
            assert trained.system.resume
            continue
        settings = cli.apply_flags(recipes.evaluation(), arguments)
        assert settings.prompts == 100
        assert settings.variants == ()
        assert settings.shares == (() if "default" in arguments.out else (0.75,))
        assert Path(settings.scores) == tmp_path / "run" / "stored_scores"
        assert Path(settings.router) == Path(settings.out).parent
    expected = [[Path(name) for name in names]]
    expected += [[Path(name) / kind for name in names] for kind in PASSES]
    assert outs == [out for row in expected for out in row]


@pytest.mark.parametrize("name", [*changes(recipes.smollm2())])
def test_a_variant_differs_from_the_recipe_in_its_change_alone(name: str) -> None:
    base = recipes.smollm2("m", "o")
    flags = changes(base)[name]
    arguments = command_line._parser().parse_args(["train", *flags])
    changed = cli.apply_flags(base, arguments)
    differing = [
        f"--{group}.{field}"
        for group, values in dataclasses.asdict(base).items()
        if isinstance(values, dict)
        for field, value in values.items()
        if getattr(getattr(changed, group), field) != value
    ]
    differing += ["--seed"] * (changed.seed != base.seed)
    assert sorted(differing) == sorted(flag for flag in flags if flag.startswith("--"))
    assert bool(flags) == (name != ablations.BASE)
    if name in LEFT_OUT:
        assert {*base.data.tasks} - {*changed.data.tasks} == {LEFT_OUT[name]}
    if name == "unbalanced":
        drawn = dict(zip(changed.data.tasks, changed.data.weights, strict=True))
        assert {drawn[task] for task in drawn if FAMILIES[task].group == "local"} == {8}
        assert {drawn[task] for task in drawn if FAMILIES[task].group == "retrieval"} == {1}


def test_a_session_goes_on_where_it_was_cut(tmp_path: Path, python: Path) -> None:
    run = tmp_path / "run"
    only = ("base", "pool_32", "without_multi_key")
    config = AblationConfig(model="m", out=str(run), only=only, side_by_side=2)
    python.with_name("python.fail").write_text("pool_32")
    with pytest.raises(ChildProcessError, match="train pool_32 failing"):
        run_ablations(config)
    assert kinds(python) == ["train"] * 3 + ["eval"] * 4
    table = json.loads((run / "ablations.json").read_text())
    assert [*table["default"]] == [*table["validated"]] == ["base", "without_multi_key"]
    python.with_name("python.fail").unlink()
    run_ablations(config)
    assert kinds(python)[7:] == ["train", "eval", "eval"]
    run_ablations(config)
    assert len(kinds(python)) == 10
    table = json.loads((run / "ablations.json").read_text())
    assert [*table["default"]] == ["base", "pool_32", "without_multi_key"]
    with tarfile.open(run / "pool_32.tar.gz") as archive:
        assert {"pool_32/flux_router.safetensors", "pool_32/validated/scores.npz"} <= {
            *archive.getnames()
        }
    # What came back is enough to go on elsewhere.
    elsewhere = tmp_path / "elsewhere"
    for path in run.glob("*.tar.gz"):
        with tarfile.open(path) as archive:
            archive.extractall(elsewhere, filter="data")
    run_ablations(dataclasses.replace(config, out=str(elsewhere)))
    assert len(kinds(python)) == 10


def test_a_session_ends_in_time(tmp_path: Path, python: Path) -> None:
    python.with_name("python.slow").write_text("base")
    config = AblationConfig(
        model="m", out=str(tmp_path / "run"), only=("base", "pool_32"), budget_s=2, side_by_side=1
    )
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="train base, train pool_32 not done; start it again"):
        run_ablations(config)
    assert time.monotonic() - began < 20
    assert kinds(python) == ["train"]
    python.with_name("python.slow").unlink()
    run_ablations(dataclasses.replace(config, budget_s=0))
    assert kinds(python)[1:] == ["train"] * 2 + ["eval"] * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recipe": "cake"}, "--recipe"),
        ({"only": ("base", "pool_17")}, r"found \['pool_17'\]"),
        ({"side_by_side": 0}, "--side_by_side"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AblationConfig(**wrong)


class InProcess:
    """Runs a command of `python -m training` in this process, as `subprocess.Popen` would."""

    def __init__(self, command: list[str], **options: object) -> None:
        assert command[1:3] == ["-m", "training"]
        self.status = command_line.main(command[3:])

    def wait(self, timeout: float | None = None) -> int:
        return self.status


@pytest.mark.slow
def test_every_variant_trains_and_is_evaluated(
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    for module in (trainer_module, evaluate_module):
        monkeypatch.setattr(module, "load_tokenizer", lambda model: tokenizer)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *names, **options: tiny_model()
    )
    stand_in = SimpleNamespace(Popen=InProcess, STDOUT=None)
    monkeypatch.setattr(ablations, "subprocess", stand_in)
    common = "--system.device cpu --system.dtype float32 --data.workers 0"
    run = tmp_path / "run"
    run_ablations(
        AblationConfig(
            model="tiny",
            out=str(run),
            corpus=str(corpus),
            side_by_side=1,
            prompts=2,
            train_flags=f"{common} --system.compile_layers false --optimizer.steps 2 "
            "--optimizer.batch_size 4 --data.min_tokens 256 --data.max_tokens 300 "
            "--router.sink_tokens 8 --router.window_tokens 32",
            eval_flags=f"{common} --lengths 256 --validation_lengths 256 --validation_prompts 1 "
            "--shares 0",
        )
    )
    names = [*changes(recipes.smollm2())]
    table = json.loads((run / "ablations.json").read_text())
    for kind in PASSES:
        rows = table[kind]
        assert [*rows] == names
        assert {row["steps"] for row in rows.values()} == {2}
        assert {name for name, row in rows.items() if "minus_base" not in row} == {"base"}
        assert {name for name, row in rows.items() if "left_out" in row} == {*LEFT_OUT}
        for name, row in rows.items():
            source = table["provenance"][kind][name]["router"]
            assert source["pool_prefix"] == (name == "both_ends")
            assert source["training"]["config"]["seed"] == (name == "seed_1")
            assert row["share_by_group"].keys() >= {"retrieval", "local"}
    assert (run / "ablations.md").read_text().count("\n| ") == 2 * (1 + len(names))
