"""Throughput at a tiny size on the CPU; its step against what the trainer itself reports."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training import model_loading, throughput
from training.__main__ import main
from training.trainer import Trainer


@pytest.fixture(autouse=True)
def model(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loading, "load_language_model", lambda *arguments: tiny_model())


def measure(out: Path, *flags: str) -> int:
    common = ["throughput", "--model", "tiny", "--recipe", "tiny", "--out", str(out)]
    return main([*common, "--tokens", "600", "--steps", "2", *flags])


@pytest.mark.long
def test_every_length_is_measured_with_each_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, str, bool]] = []
    original = Trainer.train_step

    def watch(trainer: Trainer, prompts: Any) -> Any:
        row = original(trainer, prompts)
        objective = trainer.config.loss.objective
        recomputes = trainer.routed.model.is_gradient_checkpointing
        steps.append((len(prompts), objective, recomputes))
        assert row["tokens"] == 512
        return row

    monkeypatch.setattr(Trainer, "train_step", watch)
    out = tmp_path / "throughput.json"
    # The last needs padding.
    assert measure(out, "--lengths", "128", "256", "500") == 0
    written = json.loads(out.read_text())
    found = [(row["checkpoint_layers"], row["loss"], row["length"]) for row in written["rows"]]
    assert found == [
        (checkpoint, loss, length)
        for checkpoint in (False, True)
        for loss in ("lm", "kl")
        for length in (128, 256, 500)
    ]
    assert [row["prompts"] for row in written["rows"]] == [4, 2, 1] * 4
    for row in written["rows"]:
        assert row["tokens"] == 512
        low, high = row["seconds_range"]
        assert 0 < low <= row["seconds"] <= high
        assert row["tokens_per_second"] == pytest.approx(512 / row["seconds"], rel=0.02)
        assert row["peak_gib"] == 0.0
    expected = [
        (prompts, objective, checkpoint)
        for checkpoint in (False, True)
        for objective in ("paper", "online")
        for prompts in (4, 2, 1)
        for _ in range(2 + 2)
    ]
    assert steps == expected
    assert written["config"]["router"]["window_tokens"] == 64
    assert {"git", "device", "packages"} <= written["provenance"].keys()


def test_what_does_not_fit_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.train_step

    def refuse(trainer: Trainer, prompts: Any) -> Any:
        if len(prompts[0]) == 256:
            raise torch.OutOfMemoryError("no room")
        return original(trainer, prompts)

    monkeypatch.setattr(Trainer, "train_step", refuse)
    monkeypatch.setattr(throughput, "_WARM_UP_STEPS", 0)
    out = tmp_path / "throughput.json"
    assert measure(out, "--lengths", "256", "128", "--steps", "1") == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row.get("error") for row in rows] == ["out of memory", None] * 4


def test_made_up_prompts_are_of_one_length_and_differ() -> None:
    prompts = throughput.MadeUpPrompts(256, 200)
    first, again, second = prompts[0], prompts[0], prompts[1]
    assert (len(first), first.prompt_len) == (200, 136)
    assert first.token_ids.tolist() == again.token_ids.tolist() != second.token_ids.tolist()
    assert 0 <= first.token_ids.min() <= first.token_ids.max() < 256


@pytest.mark.parametrize("flags", [("--lengths", "100"), ("--lengths", "256", "--steps", "0")])
def test_what_cannot_be_timed_is_refused(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(tmp_path / "out.json", *flags) == 2
    assert "correct --lengths or --steps" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", [None, "true", pytest.param("false", marks=pytest.mark.long)])
def test_compilation_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str | None
) -> None:
    compiled = []
    original = throughput.load_routed

    def load(model: str, sinks: int, window: int, system: Any, world: Any) -> Any:
        compiled.append(system.compile_layers)
        plain = dataclasses.replace(system, compile_layers=False)
        return original(model, sinks, window, plain, world)

    monkeypatch.setattr(throughput, "load_routed", load)
    out = tmp_path / "throughput.json"
    flags = [] if wanted is None else ["--compile_layers", wanted]
    monkeypatch.setattr(throughput, "_WARM_UP_STEPS", 0)
    assert measure(out, "--lengths", "128", "--steps", "1", *flags) == 0
    assert compiled == [wanted == "true"] * 2
    assert json.loads(out.read_text())["config"]["system"]["compile_layers"] == (wanted == "true")
