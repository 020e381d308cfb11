"""Oracle: the standardised router itself; a folded or stored one must agree with it."""

from pathlib import Path

import torch

from flux_vllm.router.checkpoint import RouterInfo, read_router, write_router
from flux_vllm.router.model import LayerRouter
from training.standardize import StandardizedRouter
from training.storage import STORED_DTYPES, round_for_storage


def trained_like(layers: int = 3, head_dim: int = 16) -> tuple[StandardizedRouter, torch.Tensor]:
    """Make a router and inputs that lie far from zero, close together."""
    router = StandardizedRouter(LayerRouter(layers, head_dim))
    features = 5 + torch.randn(layers, 1, head_dim) + 0.2 * torch.randn(layers, 64, head_dim)
    router.fit(features)
    return router, features


def test_forward_agrees_with_forward_all() -> None:
    router, features = trained_like()
    every = router.forward_all(features)
    for layer in range(3):
        torch.testing.assert_close(router(layer, features[layer]), every[layer])


def test_begin_with_full_chooses_full_everywhere() -> None:
    router, features = trained_like()
    router.begin_with_full(4.5)
    lead = router.forward_all(features).diff(dim=-1)
    assert (lead > 3.5).all()


def test_fold_computes_the_same_from_raw_inputs() -> None:
    router, features = trained_like()
    torch.testing.assert_close(
        router.fold().forward_all(features), router.forward_all(features), rtol=1e-3, atol=1e-4
    )


def test_stored_router_keeps_the_decisions(tmp_path: Path) -> None:
    router, features = trained_like()
    folded = round_for_storage(router.fold(torch.float16))
    info = RouterInfo(
        base_model="test",
        num_layers=3,
        head_dim=16,
        pool_tokens=32,
        sink_tokens=4,
        window_tokens=16,
    )
    path = write_router(tmp_path / "flux_router.safetensors", folded, info, STORED_DTYPES)
    read, _ = read_router(path)
    assert torch.equal(read.forward_all(features), folded.forward_all(features))
    probability = read.forward_all(features).softmax(dim=-1)
    expected = router.forward_all(features).softmax(dim=-1)
    torch.testing.assert_close(probability, expected, rtol=0, atol=0.02)
    assert path.stat().st_size < 0.45 * sum(4 * p.numel() for p in folded.parameters())
