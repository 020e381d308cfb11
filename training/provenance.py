"""What a result came from: versions, arguments, hardware, data."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def provenance(device: torch.device, *data: str) -> dict[str, object]:
    """Gather what is needed to repeat a run, beside its settings.

    Args:
        device: the run's.
        data: paths of the files of prompts or text; none where text was collected on the machine.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
        "git": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": _device_name(device),
        "data_sha256": {Path(file).name: digest(Path(file)) for file in data},
    }


def _git_commit() -> str:
    if "FLUX_COMMIT" in os.environ:  # a copied tree without history
        return os.environ["FLUX_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_name(model: str) -> str:
    """Name a model as others know it: a folder by its own name, not by where it lies here."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model
