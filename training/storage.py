"""How a trained router is stored: half the bytes and less, and exactly what was evaluated."""

import torch

from flux_vllm.router.model import LayerRouter

STORED_DTYPES: dict[str, torch.dtype] = {
    "features.0": torch.float16,
    "features.2": torch.float8_e4m3fn,
    "head.0": torch.float16,
    "head.2": torch.float16,
    "head.4": torch.float16,
}
"""Of the weights; biases stay float32. SmolLM2-135M's router takes 7 MB of 18."""

_WIDE, _NEXT = "features.2", "head.0"
_LARGEST = 16.0
"""Weights of `features.2` are brought near this: the middle of float8's range."""


def round_for_storage(router: LayerRouter) -> LayerRouter:
    """Round a router's weights to the dtypes they are stored in, in place.

    No activation lies between `features.2` and `head.0`, so a power of two moves from one to the
    other freely; it centres the 8-bit weights.

    Args:
        router: float32, without gradients.

    Returns: the same router.
    """
    weight, bias = router.linear(_WIDE)
    largest = weight.abs().amax(dim=(1, 2)).clamp(min=1e-12)
    scale = torch.exp2(torch.floor(torch.log2(_LARGEST / largest)))
    weight.mul_(scale[:, None, None])
    bias.mul_(scale[:, None])
    router.linear(_NEXT)[0].div_(scale[:, None, None])
    for name, dtype in STORED_DTYPES.items():
        stored = router.linear(name)[0]
        stored.copy_(stored.to(dtype))
    return router
