"""The command line: one flag a field, frozen; errors that say what to do."""

import json
from pathlib import Path

import pytest

from training import cli, recipes
from training.__main__ import _parser, main
from training.config import (
    DivergenceConfig,
    EvalConfig,
    OrderConfig,
    RouterSettings,
    TrainConfig,
)


def flags(command: str) -> set[str]:
    parser = _parser()
    choices = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    return {option for action in choices[command]._actions for option in action.option_strings}  # type: ignore[index, call-overload]


def test_every_field_has_a_flag_and_a_docstring() -> None:
    for command, config_type, default in (
        ("train", TrainConfig, recipes.budget()),
        ("eval", EvalConfig, recipes.evaluation()),
        ("divergence", DivergenceConfig, DivergenceConfig()),
        ("order", OrderConfig, OrderConfig()),
    ):
        expected = set()
        for name in config_type.__dataclass_fields__:
            value = getattr(default, name)
            inner = getattr(type(value), "__dataclass_fields__", None)
            assert name in cli.field_docs(config_type) or inner, name
            if inner is None:
                expected.add(f"--{name}")
                continue
            assert set(inner) == set(cli.field_docs(type(value))), name
            expected |= {f"--{name}.{field}" for field in inner}
        assert flags(command) - {"-h", "--help", "--recipe"} == expected


def test_context_layers_lie_at_their_depths() -> None:
    config = RouterSettings(context_depths=(0.0, 0.5, 0.75, 1.0))
    assert config.inputs(33).context_layers == (0, 16, 24, 32)
    assert config.inputs(1).context_layers == (0, 0, 0, 0)


def test_train_flags_are_frozen() -> None:
    groups = {flag.split(".")[0] for flag in flags("train")}
    assert groups == {
        "-h", "--help", "--recipe", "--model", "--out", "--seed",
        "--router", "--data", "--relaxation", "--loss", "--costs", "--optimizer", "--system",
    }  # fmt: skip
    assert len(flags("train")) == 60


def test_apply_flags_changes_only_what_was_given() -> None:
    arguments = _parser().parse_args(
        ["train", "--model", "m", "--data.tasks", "needle", "--system.resume", "false"]
    )
    config = cli.apply_flags(recipes.budget(), arguments)
    assert config.model == "m"
    assert config.data.tasks == ("needle",)
    assert config.system.resume is False
    assert config.router == recipes.budget().router
    assert config.data.max_tokens == recipes.budget().data.max_tokens


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_recipes_are_valid(name: str) -> None:
    config = recipes.RECIPES[name](model="m", out="o")
    assert (config.model, config.out) == ("m", "o")
    inputs = config.router.inputs(32)
    assert inputs.vectors == len(config.router.pools) * (1 + len(config.router.context_depths))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--model and --out"),
        (["train", "--model", "m", "--out", "o", "--data.tasks", "juggling"], "--data.tasks"),
        (["train", "--model", "m", "--out", "o", "--router.pools", "tail:0"], "--router.pools"),
        (["train", "--model", "m", "--out", "o", "--router.probe", "9"], "--router.probe"),
        (
            ["train", "--model", "m", "--out", "o", "--router.pools", "tail:200"],
            "enlarge the probe",
        ),
        (["train", "--model", "m", "--out", "o", "--router.widths", "8", "8"], "--router.widths"),
        (
            ["train", "--model", "m", "--out", "o", "--router.context_depths", "0.5", "2"],
            "context_depths to be numbers from 0 to 1, found [2.0]",
        ),
        (["train", "--model", "m", "--out", "o", "--loss.budget_nats", "0"], "--loss.budget_nats"),
        (
            ["train", "--model", "m", "--out", "o", "--router.full_decode_tokens", "-5"],
            "router.full_decode_tokens to be 0 or more, found -5",
        ),
        (["eval", "--model", "m", "--router", "/nowhere", "--out", "o"], "found nothing there"),
        (["divergence", "--model", "m"], "--router and --out"),
        (["order", "--model", "m", "--out", "o"], "--router"),
        (["eval", "--score_thresholds", "0.2", "50"], "score_thresholds to be numbers from 0 to 1"),
        (
            ["eval", "--validation_prompts", "0"],
            "validation_prompts to be at least 1 where --shares",
        ),
        (["eval", "--validation_prompts", "-3", "--shares"], "to be no less than 0, found -3"),
    ],
)
def test_main_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [str(tmp_path / "o") if word == "o" else word for word in arguments]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_join_puts_further_reports_beside(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    point = dict.fromkeys(
        ("threshold", "share", "static_share", "router_score", "static_score"), 0.5
    ) | {"least_shares": [], "router_retrieval": 0.5, "static_retrieval": 0.5}
    run = {
        **dict.fromkeys(("full_score", "all_sparse_score", "share_local", "share_retrieval"), 0.5),
        "default": {"threshold": 0.5, "full_by_group": {}},
        "points": [point],
        "patterns": {},
        "provenance": {"router": {"training": {}}},
    }
    paths = [tmp_path / f"{name}.json" for name in ("a", "b", "few", "variants")]
    for path in paths:
        path.write_text(json.dumps(run | {"name": path.stem}))
    first, second, few, variants = map(str, paths)
    out = tmp_path / "all.json"
    command = ["join", first, second, "--out", str(out), "--beside"]
    assert main([*command, f"prompts_100={few}", "--beside", f"variants_50={variants}"]) == 0
    joined = json.loads(out.read_text())
    assert {name: joined[name]["name"] for name in ("prompts_100", "variants_50")} == {
        "prompts_100": "few",
        "variants_50": "variants",
    }
    assert [run["name"] for run in joined["seeds"].values()] == ["a", "b"]


@pytest.mark.parametrize("beside", [["points=F"], ["few=F", "few=F"]], ids=["own", "twice"])
def test_join_refuses_a_name_that_is_there(
    beside: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = dict.fromkeys(("full_score", "all_sparse_score", "share_local", "share_retrieval"), 0.5)
    provenance = {"router": {"training": {}}}
    file, out = tmp_path / "run.json", tmp_path / "all.json"
    file.write_text(json.dumps(run | {"points": [], "patterns": {}, "provenance": provenance}))
    named = [name.replace("=F", f"={file}") for name in beside]
    assert main(["join", str(file), "--out", str(out), "--beside", *named]) == 2
    found = capsys.readouterr().err
    assert f"found {beside[0].partition('=')[0]!r}" in found
    assert "choose another with --beside" in found
    assert not out.exists()


def test_join_refuses_a_file_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["join", "a.json", "--out", "all.json", "--beside", "b.json"])
    assert "expected NAME=FILE, found 'b.json'" in capsys.readouterr().err


def test_corpus_command_collects_text(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "long.txt").write_text("Some words of prose that stand here. " * 100)
    (folder / "short.txt").write_text("Too short.")
    assert main(["corpus", "--out", str(tmp_path / "c.jsonl.xz"), str(folder)]) == 0
    from training.data.text import read_corpus

    assert len(read_corpus(tmp_path / "c.jsonl.xz")) == 1
