"""Queries for FlashAttention over a float8 cache, quantized here and not before attention.

vLLM would quantize them in the layer; a router, the Triton kernels and the sinks' merge read them
as the model made them.
"""

from typing import Any

import torch
from vllm import _custom_ops as ops

from flux_vllm.attention_backend.kernels.fa3 import Float8Operands


def quantize_queries(query: torch.Tensor, layer: Any) -> torch.Tensor:
    """Quantize queries as vLLM's layer does, by the layer's scale.

    Args:
        query: [T, N, H], the last two dimensions contiguous.
        layer: vLLM's attention layer.

    Returns: [T, N, H] float8_e4m3fn.
    Host sync: none. CUDA graph: safe.
    """
    quantized, _ = ops.scaled_fp8_quant(query.flatten(1), layer._q_scale)
    return quantized.view(query.shape)


def float8_operands(query: torch.Tensor, layer: Any) -> Float8Operands:
    """Return what FlashAttention-3 takes for a layer's call; arguments of `quantize_queries`."""
    return Float8Operands(
        quantize_queries(query, layer), layer._q_scale, layer._k_scale, layer._v_scale
    )
