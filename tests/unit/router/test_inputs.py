"""What a router looks at. Oracle: positions and means written out for single prompts."""

import numpy as np
import pytest
import torch

from flux_vllm.router.inputs import Pool, Probe, RouterInputs, parse_inputs
from flux_vllm.router.overlap import WIDTH, overlap

L, H = 5, 3


@pytest.mark.parametrize(
    ("prompt_len", "expected"),
    [
        (1, [0]),
        (6, [0, 1, 2, 3, 4, 5]),
        (7, [0, 1, 2, 3, 4, 5, 6]),
        (8, [0, 1, 2, 4, 5, 6, 7]),
        (1000, [0, 1, 2, 996, 997, 998, 999]),
    ],
)
def test_positions(prompt_len: int, expected: list[int]) -> None:
    probe = Probe(3, 4)
    assert probe.tokens == 7
    assert probe.positions(prompt_len).tolist() == expected


@pytest.mark.parametrize("prompt_len", [1, 3, 5, 7, 40])
def test_weights(prompt_len: int) -> None:
    inputs = parse_inputs(["head:2", "tail:3", "ends:3"], [3, 4], [])
    positions = Probe(3, 4).positions(prompt_len)
    query = np.random.default_rng(prompt_len).normal(size=(len(positions), H)).astype(np.float32)
    weights = inputs.weights(prompt_len)
    assert weights.shape == (3, 7)
    assert not weights[:, len(positions) :].any()
    pooled = weights[:, : len(positions)] @ query
    both = np.concatenate([query[:3], query[-3:]])
    expected = [query[:2].mean(0), query[-3:].mean(0), both.mean(0)]
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [(), (4,)])
def test_assemble(rows: tuple[int, ...]) -> None:
    inputs = parse_inputs(["tail:1", "tail:2"], [0, 4], [4, 1])
    pooled = torch.randn(L, *rows, 2, H)
    features = inputs.assemble(pooled)
    assert inputs.vectors == 6
    assert features.shape == (L, *rows, 6 * H)
    for layer in range(L):
        own = [pooled[place].flatten(-2) for place in (layer, 4, 1)]
        assert torch.equal(features[layer], torch.cat(own, dim=-1))


@pytest.mark.parametrize("head_dim", [8, 12, 64])
def test_what_is_told_stands_in_its_pools(head_dim: int) -> None:
    inputs = parse_inputs(["length", "tail:1", "overlap:20"], [0, 4], [])
    prompt = np.random.default_rng(0).integers(0, 9, 4096)
    told = inputs.told(prompt)
    assert told[0].tolist() == [-2.0] * WIDTH  # of 16,384 tokens
    assert not told[1].any()
    assert told[2].tolist() == overlap(prompt, 20).tolist()
    assert not inputs.weights(len(prompt))[[0, 2]].any()
    pooled = torch.zeros(L, 3, head_dim)
    pooled[:, 1] = torch.randn(L, head_dim)
    found = inputs.complete(pooled, torch.from_numpy(told))
    assert torch.equal(found[:, 1], pooled[:, 1])
    for place in range(head_dim):
        assert found[3, 0, place] == -2
        assert found[3, 2, place] == told[2, place % WIDTH]


def test_pools_are_read_as_they_are_written() -> None:
    for text in ("head:128", "tail:1", "ends:100", "length", "overlap:2048"):
        assert str(Pool.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["tail", "tail:", "tail:0", "mid:3", "tail:-1", " tail:1", "tail:1 "]
)
def test_no_pool(text: str) -> None:
    with pytest.raises(ValueError, match="expected a pool as head:TOKENS"):
        Pool.parse(text)


def test_a_pool_longer_than_the_probe() -> None:
    with pytest.raises(ValueError, match=r"at most 4 tokens \(tail\).*found tail:5; enlarge"):
        RouterInputs(pools=(Pool("tail", 5),), probe=Probe(8, 4))
    with pytest.raises(ValueError, match="at least one pool"):
        RouterInputs(pools=())
