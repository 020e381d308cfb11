"""The state a killed run resumes from."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

_KEPT = 2


def save_state(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write one training checkpoint in one atomic step; the latest two are kept.

    Args:
        folder: of the run's checkpoints.
        step: training steps done.
        state: tensors and plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:07d}.pt"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    for old in _saved(folder)[:-_KEPT]:
        old.unlink()
    return path


def load_state(folder: Path) -> dict[str, Any] | None:
    """Read the latest checkpoint that can be read; None where there is none.

    Raises: ValueError: there are checkpoints, and none can be read.
    """
    paths = _saved(folder)
    for path in reversed(paths):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001 - torch names no common class for broken files
            warnings.warn(
                f"{path} cannot be read ({error}); going back to the one before it", stacklevel=2
            )
    if paths:
        raise ValueError(
            f"expected a readable checkpoint in {folder}, found {len(paths)} that cannot be read; "
            "delete the folder or use --system.resume false to begin anew"
        )
    return None


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"))
