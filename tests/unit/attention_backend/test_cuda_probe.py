"""A layer of the CUDA backend in a probe: one FlashAttention call without a cache.

Oracle: the tests' own masked attention; FlashAttention is written anew in torch, with its meaning
of `window_size` (keys before and after the query's own). A GPU runs the real call in tests/gpu.
"""

import math
from typing import Any

import pytest
import torch

from flux_vllm.routing.probe import ProbeMetadata
from tests.helpers.oracle import naive

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
    s_aux: torch.Tensor | None,
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
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    weights = (torch.einsum("qnh,knh->nqk", q, k) * softmax_scale).masked_fill(~mask, -math.inf)
    beside = torch.full((q.shape[1],), -math.inf) if s_aux is None else s_aux
    total = weights.exp().sum(dim=-1) + beside.exp()[:, None]
    out.copy_(torch.einsum("nqk,knh->qnh", weights.exp() / total[..., None], v))


@pytest.mark.parametrize("sink_logits", [None, torch.tensor([-3.0, 0.5, 2.0, 9.0])])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_causal_attention_without_a_cache(
    window: int | None, sink_logits: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.attention.backends import fa_utils

    from flux_vllm.attention_backend.cuda.backend import FluxCUDAImpl

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attention, raising=False)
    impl: Any = FluxCUDAImpl.__new__(FluxCUDAImpl)
    impl.scale, impl.vllm_flash_attn_version, impl.sinks = 0.3, 3, sink_logits
    # As vLLM's constructor has it.
    impl.sliding_window = (-1, -1) if window is None else (window - 1, 0)
    query, key, value = (torch.randn(T, heads, H) for heads in (N, K, K))
    kept = torch.full((T, H), float("nan"))
    output = torch.full((T, N, H), float("nan"))
    metadata = ProbeMetadata(torch.tensor([0, T], dtype=torch.int32), kept)
    assert impl.forward(None, query, key, value, None, metadata, output) is output
    mask = naive.prefill_mask(range(T), naive.SPARSE, 0, window or T)
    expected = naive.attend(query, key, value, mask, 0.3, sink_logits=sink_logits)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept, query.mean(dim=1), rtol=0, atol=1e-6)
