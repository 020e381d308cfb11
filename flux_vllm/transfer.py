"""Small arrays on their way from the host to the device, without waiting for it."""

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a small array to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def upload(array: np.ndarray, target: torch.Tensor) -> None:
    """Copy a small array into a tensor of its shape and dtype without waiting for the device."""
    tensor = torch.from_numpy(array)
    target.copy_(tensor if target.device.type == "cpu" else tensor.pin_memory(), non_blocking=True)
