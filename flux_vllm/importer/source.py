"""A checkpoint folder as it lies on the disk: its configuration and the headers of its shards.

Nothing here reads a weight: what a folder holds is known, and refused, before anything is written.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_vllm.errors import CheckpointImportError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

BYTES_OF_DTYPE = {"F16": 2, "BF16": 2, "F32": 4}
"""What weights may be stored as, by safetensors' names."""

# Deeper than any checkpoint's, and far from where writing it again exceeds Python's stack.
_MOST_NESTED = 32


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's entry in a shard's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: `BF16`, `F32`, ..."""

    @property
    def nbytes(self) -> int:
        """Bytes of a weight; KeyError for a dtype that no weight may have."""
        return math.prod(self.shape) * BYTES_OF_DTYPE[self.dtype]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: CheckpointImportError: missing, unreadable, or nested too deeply.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise _nested(file) from error
    except (OSError, ValueError) as error:
        raise CheckpointImportError(
            f"expected a JSON file at {file}, found: {error}; give the folder of a whole checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointImportError(
            f"expected a JSON object in {file}, found {type(content).__name__}; download it again"
        )
    level: list[Any] = [content]
    for _ in range(_MOST_NESTED):
        level = [
            value
            for outer in level
            for value in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(value, dict | list)
        ]
    if level:
        raise _nested(file)
    return content


def read_headers(checkpoint: Path) -> dict[str, StoredTensor]:
    """List every tensor of a checkpoint, from the headers of its safetensors files.

    Args:
        checkpoint: folder with `model.safetensors.index.json` and its shards, which may be links
            as in a hub's cache, or with `model.safetensors` alone.

    Returns: name to StoredTensor.
    Raises: CheckpointImportError: missing or truncated shards, or an index that tells
        otherwise than they.
    """
    index = checkpoint / INDEX
    if not index.is_file():
        return _read_header(checkpoint / SINGLE)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise CheckpointImportError(
            f"expected a weight_map from tensors to files of the same folder in {index}, found "
            "something else; download it again"
        )
    files = sorted(set(weight_map.values()))
    if SINGLE not in files and (checkpoint / SINGLE).exists():
        raise CheckpointImportError(
            f"expected one set of weights in {checkpoint}, found {SINGLE} beside {INDEX}, which "
            "does not name it; remove the one that is not the model's"
        )
    missing = [file for file in files if not (checkpoint / file).is_file()]
    if missing:
        raise CheckpointImportError(
            f"expected the {len(files)} shards that {index} names, found {len(missing)} of them "
            f"missing: {some(missing)}; download the checkpoint again"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        header = _read_header(checkpoint / file)
        tensors |= header
        # A tensor that another shard holds too is in one place that the index denies.
        differing = [name for name in header if weight_map.get(name) != file]
        if differing:
            raise CheckpointImportError(
                f"expected in {file} the tensors that {INDEX} places there, found in it also "
                f"{some(differing)}; index and shards are not of one checkpoint, download it again"
            )
    lacking = weight_map.keys() - tensors.keys()
    if lacking:
        raise CheckpointImportError(
            f"expected every tensor of {INDEX} in its shard, found none of {some(lacking)}; index "
            "and shards are not of one checkpoint, download it again"
        )
    return tensors


def checkpoint_name(checkpoint: Path) -> str:
    """Name a checkpoint: `owner/name` of a snapshot in a hub's cache, else its folder's name."""
    folder = checkpoint.absolute()
    parts = folder.parent.parent.name.split("--")
    if folder.parent.name == "snapshots" and parts[0] == "models":
        return "/".join(parts[1:])
    return folder.resolve().name


def some(names: Collection[str]) -> str:
    """Show up to three names, and say how many more there are."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _nested(file: Path) -> CheckpointImportError:
    return CheckpointImportError(
        f"expected JSON of at most {_MOST_NESTED} levels in {file}, found more; download it again"
    )


def _read_header(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointImportError(
            f"expected a whole safetensors file at {file}, found: {error}; give a folder with "
            f"{SINGLE} or {INDEX}, or download the checkpoint again"
        ) from error
