"""Masked attention on the CPU with learned sinks, against a softmax that has them as columns.

Oracle: `tests.helpers.oracle.naive` in a finer dtype; at most twice the error of plain torch.
"""

import pytest
import torch

from flux_vllm.attention_backend.cpu.masked import attend_masked
from tests.helpers.oracle import naive

Q, S, H = 37, 91, 32


def _draw(dtype: torch.dtype, heads: int, kv_heads: int) -> list[torch.Tensor]:
    """Draw queries [Q, N, H], keys and values [S, K, H], and sinks [N] from none to all weight."""
    shapes = ((Q, heads, H), (S, kv_heads, H), (S, kv_heads, H))
    return [*(torch.randn(shape).to(dtype) for shape in shapes), torch.linspace(-9, 9, heads)]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    by_head = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return attend_masked(*by_head, mask, scale, sinks)


# Of no scale are all sinks exact numbers of a low dtype once they are divided by it.
@pytest.mark.parametrize("scale", [0.125, 0.3, 0.0442])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("by_head", [False, True], ids=["one mask", "masks by head"])
def test_learned_sinks(
    dtype: torch.dtype, heads: int, kv_heads: int, by_head: bool, scale: float
) -> None:
    query, key, value, sinks = _draw(dtype, heads, kv_heads)
    mask = torch.rand(*([heads] * by_head), Q, S) < 0.4
    mask[..., 0] = True
    found = _attend(query, key, value, mask, scale, sinks)
    assert found.dtype == dtype
    finer = torch.float64 if dtype == torch.float32 else torch.float32
    exact = naive.attend(query, key, value, mask, scale, finer, sinks)
    low = naive.attend(query, key, value, mask, scale, dtype, sinks)
    error, allowed = ((x.to(finer) - exact).abs().max().item() for x in (found, low))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


def test_a_sink_without_weight_changes_nothing() -> None:
    query, key, value, sinks = _draw(torch.float32, 4, 2)
    mask = torch.ones(Q, S, dtype=torch.bool).tril(S - Q)
    without = _attend(query, key, value, mask, 0.3, None)
    found = _attend(query, key, value, mask, 0.3, torch.full_like(sinks, -1e4))
    torch.testing.assert_close(found, without, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        without, naive.attend(query, key, value, mask, 0.3), rtol=0, atol=1e-5
    )
