"""Router files written by safetensors alone, with names and shapes of the file format."""

from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HEAD_DIM = 3, 4
METADATA = {
    "format_version": "1",
    "base_model": "org/Model-1B",
    "num_layers": "3",
    "head_dim": "4",
    "pool_tokens": "48",
    "sink_tokens": "0",
    "window_tokens": "256",
    "sparse_pattern": "streaming",
}
SHAPES = {
    "features.0": (32, 4),
    "features.2": (8, 32),
    "head.0": (16, 8),
    "head.2": (4, 16),
    "head.4": (2, 4),
}


def tensors_by_name() -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in SHAPES.items():
            tensors[f"layers.{layer}.{name}.weight"] = torch.randn(outputs, inputs)
            tensors[f"layers.{layer}.{name}.bias"] = torch.randn(outputs)
    return tensors


def write_raw(
    path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str | None
) -> Path:
    """Write a file through safetensors alone; a metadata field given as None is left out."""
    merged = {k: v for k, v in (METADATA | metadata).items() if v is not None}
    save_file(tensors_by_name() if tensors is None else tensors, str(path), merged)
    return path
