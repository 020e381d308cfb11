"""`flux-vllm routes`: its options and what it prints; the engine is replaced but for one test."""

import argparse
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flux_vllm.cli import main, routes
from flux_vllm.routing.runtime import RouteDecision

DECISION = RouteDecision(
    request_id="0", prompt_tokens=3412, routes=[1, 0, -1], full_probability=[0.875, 0.25, math.nan]
)


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    """A file with a prompt in it."""
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon a time")
    return str(file)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been handed to the engine."""
    calls: list[tuple[Any, ...]] = []

    def route_prompt(args: argparse.Namespace, text: str, config: dict[str, object]) -> object:
        calls.append((args, text, config))
        return DECISION

    monkeypatch.setattr(routes, "route_prompt", route_prompt)
    monkeypatch.setattr(routes, "require", lambda module, remedy: None)
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stdout")
    return calls


def test_routes_draws_a_map(
    prompt: str, asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["routes", "MODEL", "--prompt-file", prompt]) == 0
    shown = capsys.readouterr().out
    assert "3,412 prompt tokens: 1 of 2 layers SPARSE (50%), 1 not routed" in shown
    assert "FULL   0.88" in shown
    assert asked[0][1:] == ("Once upon a time", {})
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"


def test_routes_as_json(
    prompt: str, asked: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["routes", "MODEL", "--prompt-file", prompt, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": "MODEL",
        "prompt_tokens": 3412,
        "sparse_layers": 1,
        "routed_layers": 2,
        "layers": [
            {"layer": 0, "route": "FULL", "full_probability": 0.875},
            {"layer": 1, "route": "SPARSE", "full_probability": 0.25},
            {"layer": 2, "route": None, "full_probability": None},
        ],
    }


def test_routes_options_become_flux_config(prompt: str, asked: list[tuple[Any, ...]]) -> None:
    options = "--policy static --sparse-layers 0,2 --threshold 0 --sink-tokens 0 --window-tokens 9"
    assert main(["routes", "M", "--prompt-file", prompt, "--router", "R", *options.split()]) == 0
    assert asked[0][2] == {
        "router": "R",
        "policy": "static",
        "sparse_layers": [0, 2],
        "threshold": 0.0,
        "sink_tokens": 0,
        "window_tokens": 9,
    }


def test_routes_reads_stdin(asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert main(["routes", "M", "--prompt-file", "-"]) == 0
    assert asked[0][1] == "from a pipe"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "expected a text file"), (b"\xff\xfe", "UTF-8"), (b" \n", "found no text")],
    ids=["missing", "binary", "empty"],
)
def test_routes_refuses_prompt_file(
    content: bytes | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    assert main(["routes", "M", "--prompt-file", str(file)]) == 1
    assert expected in capsys.readouterr().err


def test_routes_refuses_sparse_layers(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routes", "M", "--prompt-file", prompt, "--sparse-layers", "0;1"]) == 1
    assert "'0;1'" in capsys.readouterr().err


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A random model of four layers and 512 positions, with a tokenizer and a router."""
    from tests.helpers.models import write_random_router, write_tiny_llama
    from tests.helpers.training_side import write_tokenizer

    model = write_tiny_llama(tmp_path / "model", max_position_embeddings=512)
    write_random_router(model, num_layers=4, head_dim=32)
    write_tokenizer(model)
    return model


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixture", "layers", "chosen"),
    [
        ("small_model", 4, [0, 3]),
        pytest.param("sample_model", 30, [1, 4, 29], marks=pytest.mark.long),
    ],
)
def test_routes_of_a_model(
    fixture: str, layers: int, chosen: list[int], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The whole command, static routes: the map is the list that was given."""
    model = request.getfixturevalue(fixture)
    (tmp_path / "prompt.txt").write_text("What is the capital of France?")
    options = f"--policy static --sparse-layers {','.join(map(str, chosen))} --chat"
    shown = subprocess.run(
        [
            *(sys.executable, "-m", "flux_vllm.cli", "routes", str(model), "--json"),
            *("--prompt-file", str(tmp_path / "prompt.txt"), "--kv-cache-gib", "0.5"),
            *("--sink-tokens", "64", "--window-tokens", "512", *options.split()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    result = json.loads(shown.stdout)
    assert result["prompt_tokens"] > 10  # the chat template's too
    sparse = [layer["layer"] for layer in result["layers"] if layer["route"] == "SPARSE"]
    assert sparse == chosen
    assert result["routed_layers"] == layers


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.long)])
def test_routes_refuses_a_prompt_that_does_not_fit(
    chat: bool, small_model: Path, tmp_path: Path
) -> None:
    """By itself or with its chat template, one line says so."""
    most = 511  # one token is generated
    found = most if chat else most + 200
    text = " ".join(["w1"] * found)
    (tmp_path / "prompt.txt").write_text(text)
    shown = subprocess.run(
        [
            *(sys.executable, "-m", "flux_vllm.cli", "routes", str(small_model)),
            *("--prompt-file", str(tmp_path / "prompt.txt"), "--kv-cache-gib", "0.5"),
            *(["--chat"] if chat else []),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    last = shown.stderr.splitlines()[-1]
    assert (shown.returncode, shown.stdout, "Traceback" in shown.stderr) == (1, "", False), last
    expected = (
        "vLLM cannot take the prompt: This model's maximum context length is 512 tokens"
        if chat
        else f"expected a prompt of at most {most:,} tokens, which the model and the KV cache "
        f"hold, found {found:,}; shorten it"
    )
    assert last.startswith(f"flux-vllm routes: error: {expected}")
