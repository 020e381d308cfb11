"""Quantized weights as checkpoints of each format hold them, and what they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_GROUP = 32
_ZERO = 8
"""The code of a weight of 0, of four bits; GPTQ's checkpoints hold one less."""
_AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each four bits of an int32 are of."""
_LARGEST_FLOAT8 = 448.0
_BLOCK = 128

Stored = tuple[dict[str, torch.Tensor], torch.Tensor]
"""A projection's tensors by the ends of their names, and the weight [out, in] they stand for."""


def quantize(folder: Path, exact: Path, form: str) -> None:
    """Quantize a tiny model's projections in place, and write the model that results.

    Args:
        folder: of the model, rewritten.
        exact: where to write it with the weights that the codes stand for, in bfloat16.
        form: of `FORMS`.
    """
    store, settings = FORMS[form]
    weights = load_file(folder / "model.safetensors")
    quantized, meant = {}, {}
    for name, weight in weights.items():
        meant[name] = weight.bfloat16()
        if not name.endswith("_proj.weight"):
            quantized[name] = weight.bfloat16()
            continue
        tensors, value = store(weight.float())
        meant[name] = value.bfloat16()
        stem = name.removesuffix("weight")
        quantized |= {stem + part: tensor.contiguous() for part, tensor in tensors.items()}
    exact.mkdir()
    shutil.copy(folder / "config.json", exact)
    save_file(meant, exact / "model.safetensors", {"format": "pt"})
    save_file(quantized, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


def _codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to four bits in groups of inputs.

    Returns: codes [out, in] int64; scales [out, groups] float16; the weight they stand for.
    """
    groups = weight.unflatten(1, (-1, _GROUP))
    scales = (groups.abs().amax(dim=-1) / (_ZERO - 1)).half()
    wide = scales.float()[..., None]
    codes = (groups / wide).round().clamp(-_ZERO, _ZERO - 1)
    return (codes + _ZERO).flatten(1).long(), scales, (codes * wide).flatten(1)


def _pack(codes: torch.Tensor, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Put eight codes next to one another in the last dimension into each int32."""
    eight = codes.unflatten(-1, (-1, 8))[..., list(places)]
    packed = (eight << (4 * torch.arange(8))).sum(dim=-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def _gptq(weight: torch.Tensor) -> Stored:
    codes, scales, value = _codes(weight)
    groups, outputs = scales.shape[1], len(weight)
    return {
        "qweight": _pack(codes).t(),
        "qzeros": _pack(torch.full((groups, outputs), _ZERO - 1)),
        "scales": scales.t(),
        "g_idx": (torch.arange(weight.shape[1]) // _GROUP).int(),
    }, value


def _awq(weight: torch.Tensor) -> Stored:
    codes, scales, value = _codes(weight)
    groups, outputs = scales.shape[1], len(weight)
    return {
        "qweight": _pack(codes.t(), _AWQ_PLACES),
        "qzeros": _pack(torch.full((groups, outputs), _ZERO), _AWQ_PLACES),
        "scales": scales.t(),
    }, value


def _packed(weight: torch.Tensor) -> Stored:
    codes, scales, value = _codes(weight)
    return {
        "weight_packed": _pack(codes),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }, value


def _int8(weight: torch.Tensor) -> Stored:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scale).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale


def _float8(weight: torch.Tensor) -> Stored:
    scale = weight.abs().amax(dim=1, keepdim=True) / _LARGEST_FLOAT8
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def _float8_blocks(weight: torch.Tensor) -> Stored:
    blocks = weight.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    scale = blocks.abs().amax(dim=(1, 3)) / _LARGEST_FLOAT8
    wide = scale[:, None, :, None]
    codes = (blocks / wide).to(torch.float8_e4m3fn)
    tensors = {"weight": codes.flatten(2).flatten(0, 1), "weight_scale_inv": scale}
    return tensors, (codes.float() * wide).flatten(2).flatten(0, 1)


def _compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> Any:
    """Give the settings of a compressed-tensors checkpoint."""
    plain = {"symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": plain | weights}
    group["input_activations"] = activations and plain | activations | {"dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_BY_CHANNEL, _BY_TOKEN = (
    {"num_bits": 8, "strategy": "channel"},
    {"num_bits": 8, "strategy": "token"},
)
FORMS: dict[str, tuple[Callable[[torch.Tensor], Stored], Any]] = {
    "gptq": (
        _gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": _GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    ),
    "awq": (
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": _GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "w4a16": (
        _packed,
        _compressed(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": _GROUP},
            None,
        ),
    ),
    "w8a8-int8": (
        _int8,
        _compressed("int-quantized", _BY_CHANNEL | {"type": "int"}, _BY_TOKEN | {"type": "int"}),
    ),
    "w8a8-fp8": (
        _float8,
        _compressed(
            "float-quantized", _BY_CHANNEL | {"type": "float"}, _BY_TOKEN | {"type": "float"}
        ),
    ),
    "fp8-blocks": (
        _float8_blocks,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
        },
    ),
}
"""How each format stores a projection, and what its checkpoints' configurations say."""
