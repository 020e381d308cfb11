"""Measured costs of sampled routes, and the files they are kept in.

Dimension legend: N prompts, K samples of routes a prompt, L layers, P pools, H head dim.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

_ABOUT = "measured.json"
_MISSING = {"sparse": 0, "nats": np.nan, "slopes": np.nan}
"""What stands in the samples of prompts that have fewer."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """What sampled routes cost prompts."""

    pooled: np.ndarray
    """[N, L, P, H] float16: every layer's pooled queries, as the probe sees them."""
    sparse: np.ndarray
    """[N, K, L] uint8: 1 where the sample's layer is SPARSE."""
    nats: np.ndarray
    """[N, K] float32: KL(full attention || sample), mean over answer tokens; NaN: no sample."""
    slopes: np.ndarray
    """[N, K, L] float32: d nats / d sparse; NaN where they were not computed."""
    tokens: np.ndarray
    """[N] int64: prompt lengths."""
    place: np.ndarray
    """[N] int64: of the prompt in its files."""
    held_out: np.ndarray
    """[N] bool: not to be fitted to."""

    def __len__(self) -> int:
        return len(self.place)

    def take(self, rows: np.ndarray) -> "Measurements":
        """Keep some prompts: indices or a mask."""
        return Measurements(*(getattr(self, field.name)[rows] for field in fields(self)))

    def save(self, path: Path) -> None:
        """Write in one atomic step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing.")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        Path(temporary).chmod(0o644)  # others may fit to what one measured
        Path(temporary).replace(path)


def join(parts: Sequence[Measurements]) -> Measurements:
    """Put measurements of different prompts together.

    Raises: ValueError: none, or of different models or pools.
    """
    shapes = {part.pooled.shape[1:] for part in parts}
    if len(shapes) != 1:
        raise ValueError(
            f"expected measurements of one model and set of pools, found {sorted(shapes)} as "
            "layers, pools and head dims; measure into another folder"
        )
    samples = max(part.nats.shape[1] for part in parts)
    columns = {}
    for field in fields(Measurements):
        arrays = [getattr(part, field.name) for part in parts]
        if field.name in _MISSING:
            arrays = [_pad(array, samples, _MISSING[field.name]) for array in arrays]
        columns[field.name] = np.concatenate(arrays)
    return Measurements(**columns)


def _pad(array: np.ndarray, samples: int, value: float) -> np.ndarray:
    missing = [(0, 0)] * array.ndim
    missing[1] = (0, samples - array.shape[1])
    return np.pad(array, missing, constant_values=value)


def open_folder(folder: Path, about: dict[str, Any]) -> list[Measurements]:
    """Read what a folder holds so far, or begin it.

    Args:
        folder: of measurements.
        about: what they are of: model, files, SPARSE's meaning, pools.

    Raises: ValueError: the folder's are of something else.
    """
    described = folder / _ABOUT
    if not described.exists():
        folder.mkdir(parents=True, exist_ok=True)
        described.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    else:
        found = json.loads(described.read_text(encoding="utf-8"))
        changed = sorted(name for name in about if found.get(name) != about[name])
        if changed:
            raise ValueError(
                f"expected measurements of the same {', '.join(changed)} in {folder}, found "
                f"{', '.join(f'{name}={found.get(name)!r}' for name in changed)}; measure into "
                "another --out"
            )
    return read_folder(folder)


def read_folder(folder: Path) -> list[Measurements]:
    """Read all files of a folder."""
    names = [field.name for field in fields(Measurements)]
    parts = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            parts.append(Measurements(**{name: file[name] for name in names}))
    return parts
