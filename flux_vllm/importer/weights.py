"""Writing what an import keeps: the model's weights, shard by shard, and the router's file."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flux_vllm.errors import CheckpointImportError
from flux_vllm.importer.source import INDEX, SINGLE, StoredTensor
from flux_vllm.importer.tensors import EMBEDDING, TIED_HEAD, SortedTensors, source_name
from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_ROWS = 8192  # of an embedding compared at a time


def check_tied_head(tensors: SortedTensors) -> None:
    """Check that an output layer stored beside tied embeddings is the same matrix.

    Raises: CheckpointImportError: it differs, so that one of the two would be lost.
    """
    head, embedding = tensors.tied_head, tensors.model[EMBEDDING]
    if head is None:
        return
    with safe_open(head.file, "pt") as one, safe_open(embedding.file, "pt") as other:
        left, right = one.get_slice(TIED_HEAD), other.get_slice(EMBEDDING)
        for row in range(0, head.shape[0], _ROWS):
            rows = slice(row, row + _ROWS)
            if not torch.equal(left[rows].float(), right[rows].float()):
                raise CheckpointImportError(
                    f"expected {TIED_HEAD} equal to {EMBEDDING}, as config.json says with "
                    "tie_word_embeddings, found another matrix; set tie_word_embeddings to false "
                    "if the output layer was trained"
                )


def write_weights(
    model: Mapping[str, StoredTensor], folder: Path, progress: Callable[[str], None]
) -> None:
    """Write the model's tensors as they are stored, one file for one file read, and an index.

    Nothing is converted: at most one shard is mapped into memory.
    """
    by_file: dict[Path, list[str]] = {}
    for name, stored in model.items():
        by_file.setdefault(stored.file, []).append(name)
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(sorted(by_file.items()), start=1):
        count = len(by_file)
        written = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        progress(f"writing {written}")
        with safe_open(file, framework="pt") as shard:
            # "format" is what transformers looks for in a file.
            save_file(
                {name: shard.get_tensor(name) for name in names},
                folder / written,
                metadata={"format": "pt"},
            )
        weight_map |= dict.fromkeys(names, written)
    write_json(
        folder / INDEX,
        {
            "metadata": {"total_size": sum(stored.nbytes for stored in model.values())},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )


def write_imported_router(router: Mapping[str, StoredTensor], info: RouterInfo, path: Path) -> Path:
    """Write a router file from the authors' tensors, without loss.

    Args:
        router: by the names of a router file. Where the last linear layer has one output, the
            log-odds of FULL, it becomes FULL's logit beside a SPARSE logit of 0.
        info: the file's metadata.
        path: the file.

    Returns: the file.
    """
    layers = LayerRouter(info.num_layers, info.head_dim).requires_grad_(False)
    opened: dict[Path, Any] = {}
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, stored in router.items():
        if stored.file not in opened:
            opened[stored.file] = safe_open(stored.file, framework="pt")
        tensor = opened[stored.file].get_tensor(source_name(name)).float()
        _, layer, linear = name.split(".", 2)
        linear, kind = linear.rsplit(".", 1)
        weight, bias = layers.linear(linear)
        target = (weight if kind == "weight" else bias)[int(layer)]
        if tensor.shape[0] == 1 and target.shape[0] == 2:
            target[Route.SPARSE], target[Route.FULL] = 0.0, tensor[0]
        else:
            target.copy_(tensor)
        if kind == "weight":
            dtypes.setdefault(linear, set()).add(_DTYPES[stored.dtype])
    kept = {
        linear: found.pop() if len(found) == 1 else torch.float32
        for linear, found in dtypes.items()
    }
    return write_router(path, layers, info, kept)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
