"""What a float8 KV cache makes of keys and values, and checkpoints that ask for one."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KINDS = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""By vLLM's names."""


def cut(numbers: torch.Tensor, kind: str, scale: float = 1.0) -> torch.Tensor:
    """Cut numbers to float8 of `scale`, towards zero, as vLLM's CPU kernels do; in their dtype.

    By definition: of all that float8 can say, the largest that is not larger.
    """
    said = torch.arange(128, dtype=torch.uint8).view(KINDS[kind]).float()
    said = said[said.isfinite()]
    size = numbers.float().abs().contiguous() / scale
    index = torch.searchsorted(said, size, right=True) - 1
    return (said[index] * scale * numbers.float().sign()).to(numbers.dtype)


def ask_for_scaled_cache(folder: Path, scales: dict[tuple[int, str], float]) -> None:
    """Have a checkpoint ask for a float8 cache with these scales of its layers' keys and values."""
    weights = load_file(folder / "model.safetensors")
    for (layer, part), scale in scales.items():
        weights[f"model.layers.{layer}.self_attn.{part}_scale"] = torch.tensor(scale)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
