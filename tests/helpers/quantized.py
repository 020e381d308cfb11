"""Weights quantized to four bits as GPTQ's checkpoints hold them, and what they stand for."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_GROUP = 32
_ZERO = 8
"""The code of a weight of 0; checkpoints hold one less."""


def quantize_to_gptq(folder: Path, exact: Path) -> None:
    """Quantize a tiny model's projections in place, and write the model that results.

    Args:
        folder: of the model, rewritten.
        exact: where to write it with the weights that the codes stand for, in bfloat16.
    """
    weights = load_file(folder / "model.safetensors")
    quantized, meant = {}, {}
    for name, weight in weights.items():
        meant[name] = weight.bfloat16()
        if not name.endswith("_proj.weight"):
            quantized[name] = weight.bfloat16()
            continue
        codes, scales = _round(weight.float())
        meant[name] = _expand(codes, scales).bfloat16()
        stem = name.removesuffix("weight")
        quantized |= {stem + part: tensor for part, tensor in _pack(codes, scales).items()}
    exact.mkdir()
    shutil.copy(folder / "config.json", exact)
    save_file(meant, exact / "model.safetensors", {"format": "pt"})
    save_file(quantized, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": _GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _round(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give codes [out, groups, group] int64 and scales [out, groups] float16 of [out, in]."""
    groups = weight.unflatten(1, (-1, _GROUP))
    scales = (groups.abs().amax(dim=-1) / (_ZERO - 1)).half()
    codes = (groups / scales.float()[..., None]).round().clamp(-_ZERO, _ZERO - 1) + _ZERO
    return codes.long(), scales


def _expand(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return ((codes - _ZERO) * scales.float()[..., None]).flatten(1)


def _pack(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Put eight codes of an output into each int32, along the inputs."""
    by_input = codes.flatten(1).t()
    inputs, outputs = by_input.shape
    packed = torch.zeros(inputs // 8, outputs, dtype=torch.int64)
    for place in range(8):
        packed |= by_input[place::8] << (4 * place)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed)
    zeros = sum((_ZERO - 1) << (4 * place) for place in range(8))
    return {
        "qweight": packed.int(),
        "qzeros": torch.full((inputs // _GROUP, outputs // 8), zeros, dtype=torch.int32),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(inputs) // _GROUP).int(),
    }
