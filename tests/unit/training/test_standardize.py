"""Oracle: the standardised router itself; a folded or stored one must agree with it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flux_vllm.router.checkpoint import RouterInfo, read_router, write_router
from flux_vllm.router.model import LayerRouter
from training.standardize import StandardizedRouter
from training.storage import round_for_storage, stored_dtypes

LAYERS, HEAD_DIM = 3, 16
SIZES = {"paper": (1, ()), "own": (4, (24, 20, 16, 12))}


def trained_like(size: str = "paper") -> tuple[StandardizedRouter, torch.Tensor]:
    """Make a router and inputs that lie far from zero, close together."""
    vectors, widths = SIZES[size]
    router = StandardizedRouter(LayerRouter(LAYERS, HEAD_DIM, vectors, widths))
    inputs = vectors * HEAD_DIM
    features = 5 + torch.randn(LAYERS, 1, inputs) + 0.2 * torch.randn(LAYERS, 64, inputs)
    router.fit(features)
    return router, features


def test_inputs_are_standardised_layer_by_layer() -> None:
    router, features = trained_like("own")
    centred = (features - features.mean(dim=1, keepdim=True)) / features.std(dim=1, keepdim=True)
    torch.testing.assert_close(router(features), router.router.forward_all(centred))


def test_inputs_that_hardly_differ_are_not_blown_up() -> None:
    router, features = trained_like("own")
    features[:, :, 3] = 5 + 1e-4 * torch.randn(LAYERS, 64)
    router.fit(features)
    usual = features.std(dim=1).median(dim=1).values
    torch.testing.assert_close(router.inverse_deviation[:, 3], 1 / (0.1 * usual))
    torch.testing.assert_close(router.inverse_deviation[:, 4], 1 / features.std(dim=1)[:, 4])


def test_begin_with_full_chooses_full_everywhere() -> None:
    router, features = trained_like()
    router.begin_with_full(4.5)
    assert (router(features).diff(dim=-1) > 3.5).all()


@pytest.mark.parametrize("size", SIZES)
def test_fold_computes_the_same_from_raw_inputs(size: str) -> None:
    router, features = trained_like(size)
    torch.testing.assert_close(
        router.fold().forward_all(features), router(features), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("size", SIZES)
def test_stored_router_keeps_the_decisions(size: str, tmp_path: Path) -> None:
    router, features = trained_like(size)
    dtypes = stored_dtypes(router.router)
    folded = round_for_storage(router.fold(dtypes["features.0"]), dtypes)
    vectors, widths = SIZES[size]
    info = RouterInfo(
        base_model="test",
        num_layers=LAYERS,
        head_dim=HEAD_DIM,
        pool_tokens=32,
        pools=("tail:1", "tail:32", "head:32", "ends:16")[:vectors] if widths else (),
        widths=widths,
        sink_tokens=4,
        window_tokens=16,
    )
    path = write_router(tmp_path / "flux_router.safetensors", folded, info, dtypes)
    read, _ = read_router(path)
    assert torch.equal(read.forward_all(features), folded.forward_all(features))
    probability = read.forward_all(features).softmax(dim=-1)
    expected = router(features).softmax(dim=-1)
    torch.testing.assert_close(probability, expected, rtol=0, atol=0.02)


def test_only_the_papers_largest_layer_takes_a_byte_a_weight(tmp_path: Path) -> None:
    paper, own = (stored_dtypes(trained_like(size)[0].router) for size in ("paper", "own"))
    assert paper["features.2"] == torch.float8_e4m3fn
    assert {name for name, dtype in paper.items() if dtype == torch.float16} == (
        paper.keys() - {"features.2"}
    )
    assert set(own.values()) == {torch.float16}
    router, _ = trained_like()
    folded = round_for_storage(router.fold(torch.float16), paper)
    info = RouterInfo(
        base_model="test",
        num_layers=LAYERS,
        head_dim=HEAD_DIM,
        pool_tokens=32,
        sink_tokens=4,
        window_tokens=16,
    )
    path = write_router(tmp_path / "flux_router.safetensors", folded, info, paper)
    with safe_open(path, framework="pt") as file:
        for name, dtype in paper.items():
            assert file.get_tensor(f"layers.1.{name}.weight").dtype == dtype
    assert path.stat().st_size < 0.45 * sum(4 * p.numel() for p in folded.parameters())
