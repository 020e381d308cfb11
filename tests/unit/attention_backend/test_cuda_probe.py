"""A layer of the CUDA backend in a probe: one FlashAttention call without a cache.

Oracle: the tests' own masked attention; FlashAttention is written anew in torch, with its meaning
of `window_size` (keys before and after the query's own). A GPU runs the real call in tests/gpu.
"""

from typing import Any

import pytest
import torch

from flux_vllm.routing.probe import ProbeMetadata
from tests.helpers.reference_attention import SparsePattern, masked_attention

pytestmark = pytest.mark.vllm

N, K, H, T = 4, 2, 16, 23


def flash_attention(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: list[int] | None,
    fa_version: int,
) -> None:
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, len(q)]
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == len(q)
    assert causal
    assert fa_version == 3
    left, right = window_size or (-1, -1)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    mask = (
        (distance >= 0) & ((distance <= left) | (left < 0)) & ((distance >= -right) | (right < 0))
    )
    attended = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, v)), mask, scale=softmax_scale, enable_gqa=True
    )
    out.copy_(attended.transpose(0, 1))


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_causal_attention_without_a_cache(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.attention.backends import fa_utils

    from flux_vllm.attention_backend.cuda.backend import FluxCUDAImpl

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attention, raising=False)
    impl: Any = FluxCUDAImpl.__new__(FluxCUDAImpl)
    impl.scale, impl.vllm_flash_attn_version = 0.3, 3
    # As vLLM's constructor has it.
    impl.sliding_window = (-1, -1) if window is None else (window - 1, 0)
    query, key, value = (torch.randn(T, heads, H) for heads in (N, K, K))
    kept = torch.full((T, H), float("nan"))
    output = torch.full((T, N, H), float("nan"))
    metadata = ProbeMetadata(torch.tensor([0, T], dtype=torch.int32), kept)
    assert impl.forward(None, query, key, value, None, metadata, output) is output
    q_NTH, k_KTH, v_KTH = (t.transpose(0, 1) for t in (query, key, value))
    pattern = SparsePattern(0, window or T, 1)
    expected = masked_attention(q_NTH, k_KTH, v_KTH, 0.3, 0, "prefill", pattern)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept, query.mean(dim=1), rtol=0, atol=1e-6)
