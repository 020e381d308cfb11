"""Oracle: dense float32 softmax under an explicit mask (tests/helpers/oracle)."""

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.oracle import naive as oracle
from training.soft_attention import (
    full_attention,
    make_sparse_attention,
    mix,
    sink_window_mask,
)


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sink: int, window: int
) -> torch.Tensor:
    """Sink+window attention of [B, N, T, H] by the oracle."""
    mask = oracle.prefill_mask(range(q.shape[2]), oracle.SPARSE, sink, window)
    rows = zip(*(x.transpose(1, 2) for x in (q, k, v)), strict=True)
    return torch.stack([oracle.attend(*row, mask, scale).transpose(0, 1) for row in rows])


# Below S + W, equal to it and one above; block edges of 16; unaligned tails.
@pytest.mark.parametrize("tokens", [5, 20, 21, 32, 33, 63, 111])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 1)], ids=["g1", "g4", "g8"])
def test_sparse_attention_matches_naive(tokens: int, heads: int, kv_heads: int) -> None:
    q = torch.randn(2, heads, tokens, 8)
    k, v = torch.randn(2, 2, kv_heads, tokens, 8)
    expected = naive(q, k, v, 0.5, sink=4, window=16)
    found = make_sparse_attention("sdpa", 4, 16)(q, k, v, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sparse_equals_full_within_sink_and_window() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 8)
    sparse = make_sparse_attention("sdpa", 4, 16)(q, k, v, 0.3)
    torch.testing.assert_close(sparse, full_attention(q, k, v, 0.3))


def test_sparse_attention_gives_gradients_of_naive() -> None:
    q, k, v = (torch.randn(1, 2, 50, 8, requires_grad=True) for _ in range(3))
    weight = torch.randn(1, 2, 50, 8)
    found = torch.autograd.grad(
        (make_sparse_attention("sdpa", 4, 16)(q, k, v, 0.5) * weight).sum(), (q, k, v)
    )
    expected = torch.autograd.grad((naive(q, k, v, 0.5, 4, 16) * weight).sum(), (q, k, v))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Whole blocks and parts of one; sinks and windows on block edges, off them, and beyond the tokens.
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 640, 1000, 1536])
@pytest.mark.parametrize(
    ("sink", "window"),
    [(0, 1), (1, 128), (64, 512), (100, 300), (128, 128), (129, 257), (200, 200), (2048, 4096)],
)
def test_sink_window_mask_is_what_torch_makes_of_all_pairs(
    tokens: int, sink: int, window: int
) -> None:
    found = sink_window_mask(sink, window, tokens, torch.device("cpu"))
    expected = create_block_mask(found.mask_mod, None, None, tokens, tokens, device="cpu")
    assert found.shape == expected.shape
    assert torch.equal(found.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        counts = getattr(expected, name)
        assert torch.equal(getattr(found, name), counts), name
        lists = name.replace("num_blocks", "indices")
        listed = torch.arange(counts.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(found, lists)[listed], getattr(expected, lists)[listed]), lists
    position = torch.arange(tokens)
    distance = position[:, None] - position
    seen = (distance >= 0) & ((distance < window) | (position < sink))
    assert torch.equal(found.mask_mod(0, 0, position[:, None], position), seen)


def test_masks_of_all_lengths_share_what_flex_attention_is_compiled_for() -> None:
    short, long = (sink_window_mask(64, 512, n, torch.device("cpu")) for n in (640, 2048))
    assert short.mask_mod is long.mask_mod


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def test_sink_window_mask_of_a_long_prompt_takes_little_memory() -> None:
    with LargestTensor() as largest:
        sink_window_mask(128, 2048, 65536, torch.device("cpu"))
    assert 512**2 <= largest.elements <= 513**2


def test_mix_is_exact_at_the_extremes() -> None:
    full, sparse = torch.randn(2, 1, 2, 6, 4).bfloat16()
    z = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]])
    mixed = mix(full, sparse, z)
    assert torch.equal(mixed[:, :, [0, 2, 5]], full[:, :, [0, 2, 5]])
    assert torch.equal(mixed[:, :, [1, 3, 4]], sparse[:, :, [1, 3, 4]])


def test_make_sparse_attention_refuses_sinks_wider_than_the_window() -> None:
    with pytest.raises(ValueError, match="sink_tokens"):
        make_sparse_attention("sdpa", 32, 16)
    with pytest.raises(ValueError, match="'flex' or 'sdpa'"):
        make_sparse_attention("other", 4, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [128, 640, 1152])
def test_flex_matches_sdpa_on_a_gpu(tokens: int) -> None:
    q = torch.randn(2, 9, tokens, 64, device="cuda")
    k, v = torch.randn(2, 2, 3, tokens, 64, device="cuda")
    expected = make_sparse_attention("sdpa", 16, 256)(q, k, v, 0.125)
    found = make_sparse_attention("flex", 16, 256)(q, k, v, 0.125)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
