"""Places among routed layers and numbers of all. Oracle: both written down by hand."""

from pathlib import Path

import pytest
import torch

from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router.checkpoint import RouterInfo, read_router, write_router
from flux_vllm.router.route import full_probability
from training.routed_layers import RoutedLayers

LAYERS = RoutedLayers((1, 3, 4), 6)


def info(**changes: object) -> RouterInfo:
    given = {
        "base_model": "tiny",
        "num_layers": 6,
        "head_dim": 8,
        "pool_tokens": 16,
        "sink_tokens": 16,
        "window_tokens": 64,
        "pools": ("tail:4",),
        "context_layers": (3,),
        "widths": (8, 4, 6, 5),
    }
    return RouterInfo(**given | changes)  # type: ignore[arg-type]


def test_places_and_numbers() -> None:
    assert LAYERS.number([2, 0]) == [4, 1]
    assert LAYERS.place([4, 1], "layers") == [2, 0]
    assert LAYERS.order([2, 0, 1]) == (4, 1, 3, 0, 2, 5)
    assert RoutedLayers.every(3) == RoutedLayers((0, 1, 2), 3)
    with pytest.raises(
        ValueError, match=r"static_layers among .* \[1, 3, 4\] of 6, found \[0, 9\]"
    ):
        LAYERS.place([9, 1, 0], "static_layers")


def test_a_router_goes_through_its_file_and_back(tmp_path: Path) -> None:
    narrow = LAYERS.narrow(info().make_router(), info())[0]
    file = write_router(tmp_path, LAYERS.widen(narrow), info())
    again, inputs = LAYERS.narrow(*read_router(file))
    assert inputs.context_layers == (1,)
    seen = torch.randn(3, 5, 16)
    assert torch.equal(again.forward_all(seen), narrow.forward_all(seen))
    wide = read_router(file)[0].forward_all(torch.randn(6, 5, 16))
    assert torch.isfinite(wide).all()
    assert not wide[[0, 2, 5]].any()


def test_layers_that_are_always_sparse_stay_so() -> None:
    given = info(always_sparse=(0, 4))
    router = given.make_router()
    router.make_sparse(given.always_sparse)
    narrow, _ = LAYERS.narrow(router, given)
    p_full = full_probability(narrow.forward_all(torch.randn(3, 5, 16)))
    assert (p_full == 0).all(dim=1).tolist() == [False, False, True]


def test_a_router_that_does_not_fit_is_refused() -> None:
    other = info(num_layers=4)
    with pytest.raises(RouterCheckpointError, match="of 6 layers, the model's, found one of 4"):
        LAYERS.narrow(other.make_router(), other)
    outside = info(context_layers=(2,))
    with pytest.raises(ValueError, match=r"router's context layers among .* found \[2\]"):
        LAYERS.narrow(outside.make_router(), outside)


def test_a_folder_keeps_them(tmp_path: Path) -> None:
    assert RoutedLayers.load(tmp_path, 5) == RoutedLayers.every(5)
    LAYERS.save(tmp_path)
    assert RoutedLayers.load(tmp_path, 3) == LAYERS
    assert [path.name for path in tmp_path.iterdir()] == ["layers.json"]
