"""The command line itself: help, errors, exit codes."""

import subprocess
import sys

import pytest

from flux_vllm import __version__
from flux_vllm.cli import commands, main, sample_model
from flux_vllm.cli.console import CommandError, require
from flux_vllm.errors import RouterCheckpointError


def test_main_without_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    for command in ("serve", "sample-model", "import", "inspect", "routes"):
        assert command in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "flux-vllm COMMAND --help"),
        (["--version"], f"flux-vllm {__version__}"),
        (["sample-model", "--help"], "SmolLM2-135M-Instruct"),
        (["import", "--help"], "flux_import.json"),
        (["inspect", "--help"], "--model"),
        (["routes", "--help"], "--prompt-file"),
    ],
)
def test_help_explains(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert expected in capsys.readouterr().out


def test_main_refuses_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["server"])
    assert left.value.code == 2
    assert "'server'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [CommandError("no such thing"), RouterCheckpointError("no such")])
def test_main_reports_errors_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(sample_model, "run", fail)
    assert main(["sample-model", "somewhere"]) == 1
    assert capsys.readouterr().err == f"flux-vllm sample-model: error: {error}\n"


def test_main_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_model, "run", interrupt)
    assert main(["sample-model", "somewhere"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_main_takes_sys_argv(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flux-vllm", "--version"])
    with pytest.raises(SystemExit):
        commands.main()
    assert __version__ in capsys.readouterr().out


def test_require_names_module_and_remedy() -> None:
    with pytest.raises(CommandError, match=r"'no_such_module'.*; install it"):
        require("no_such_module", "install it")


def test_module_runs() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "flux_vllm.cli", "--version"], capture_output=True, text=True
    )
    assert shown.stdout == f"flux-vllm {__version__}\n"
