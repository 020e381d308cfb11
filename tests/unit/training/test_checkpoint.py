"""Pins: a checkpoint cut short by a kill must not lose the run."""

from pathlib import Path

import pytest
import torch

from training.checkpoint import load_state, save_state


def test_load_state_returns_the_latest(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    for step in (10, 20, 30):
        save_state(tmp_path, step, {"value": torch.tensor(step)})
    state = load_state(tmp_path)
    assert state is not None
    assert state["step"] == 30
    assert state["value"].item() == 30
    assert len(list(tmp_path.iterdir())) == 2  # older ones go, nothing half-written stays


def test_load_state_goes_back_from_a_broken_file(tmp_path: Path) -> None:
    save_state(tmp_path, 10, {"value": 1})
    latest = save_state(tmp_path, 20, {"value": 2})
    latest.write_bytes(latest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be read"):
        state = load_state(tmp_path)
    assert state is not None
    assert state["value"] == 1


def test_load_state_refuses_to_begin_anew_in_silence(tmp_path: Path) -> None:
    save_state(tmp_path, 10, {"value": 1}).write_bytes(b"no checkpoint")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(ValueError, match=r"--system\.resume false"),
    ):
        load_state(tmp_path)


def test_save_state_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    save_state(tmp_path, 10, {"value": 1})
    with pytest.raises((AttributeError, TypeError, RuntimeError, Exception), match=r".+"):
        save_state(tmp_path, 20, {"value": lambda: None})
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000010.pt"]
