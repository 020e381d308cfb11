"""Which layers of a shape benchmarks make SPARSE. Oracle: layers counted by hand."""

import pytest

from benchmarks.serve_cases import Shape
from benchmarks.suite import SHAPE

ATTENTION = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "vocab_size": 100,
}


def test_all_layers_where_none_is_of_another_kind() -> None:
    shape = Shape.of(ATTENTION | {"num_hidden_layers": 8})
    assert shape.head_dim == 64
    assert shape.spread(0.5) == [1, 3, 5, 7]
    assert shape.spread(1.0) == list(range(8))
    assert shape.shares([0.3, 0.75]) == (0.25, 0.75)


@pytest.mark.parametrize("is_nested", [False, True])
def test_layers_of_full_attention_alone(is_nested: bool) -> None:
    kinds = ["linear_attention", "full_attention", "sliding_attention", "full_attention"]
    config = ATTENTION | {"num_hidden_layers": 12, "head_dim": 32, "layer_types": kinds * 3}
    shape = Shape.of({"text_config": config} if is_nested else config)
    assert shape.head_dim == 32
    assert shape.routed == (1, 3, 5, 7, 9, 11)
    assert shape.spread(1.0) == [1, 3, 5, 7, 9, 11]
    assert shape.spread(0.5) == [3, 7, 11]
    assert shape.shares([0.75]) == (pytest.approx(4 / 6),)


@pytest.mark.parametrize("folder", sorted(SHAPE.parent.iterdir()), ids=lambda folder: folder.name)
def test_shapes_have_layers_to_make_sparse(folder) -> None:
    shape = Shape.read(folder)
    assert len(shape.spread(0.75)) >= 4
    assert set(shape.spread(0.75)) <= set(shape.routed) <= set(range(shape.layers))
