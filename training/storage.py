"""How a trained router is stored: half the bytes and less, and exactly what was evaluated."""

import torch

from flux_vllm.router.model import LayerRouter, linear_shapes, paper_widths

_WIDE, _NEXT = "features.2", "head.0"
_LARGEST = 16.0
"""Weights of `features.2` are brought near this: the middle of float8's range."""


def stored_dtypes(router: LayerRouter) -> dict[str, torch.dtype]:
    """Say in what dtype each linear layer's weights are stored; biases stay float32.

    In routers of the paper's sizes `features.2` is the largest by far and takes a byte a weight:
    SmolLM2-135M's router then has 7 MB of 18.
    """
    dtypes = dict.fromkeys(router.shapes, torch.float16)
    if router.shapes == linear_shapes(router.num_inputs, paper_widths(router.head_dim)):
        dtypes[_WIDE] = torch.float8_e4m3fn
    return dtypes


def round_for_storage(router: LayerRouter, dtypes: dict[str, torch.dtype]) -> LayerRouter:
    """Round a router's weights to the dtypes they are stored in, in place.

    No activation lies between `features.2` and `head.0`, so a power of two moves from one to the
    other freely; it centres the 8-bit weights.

    Args:
        router: float32, without gradients.
        dtypes: of `stored_dtypes`.

    Returns: the same router.
    """
    if dtypes[_WIDE] == torch.float8_e4m3fn:
        weight, bias = router.linear(_WIDE)
        largest = weight.abs().amax(dim=(1, 2)).clamp(min=1e-12)
        scale = torch.exp2(torch.floor(torch.log2(_LARGEST / largest)))
        weight.mul_(scale[:, None, None])
        bias.mul_(scale[:, None])
        router.linear(_NEXT)[0].div_(scale[:, None, None])
    for name, dtype in dtypes.items():
        stored = router.linear(name)[0]
        stored.copy_(stored.to(dtype))
    return router
