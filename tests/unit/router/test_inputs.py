"""What a router looks at. Oracle: positions and means written out for single prompts; for what is
read, a router's outputs as its inputs change."""

import numpy as np
import pytest
import torch

from flux_vllm.router.inputs import Pool, Probe, RouterInputs, parse_inputs
from flux_vllm.router.model import LayerRouter
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


class TestLayersRead:
    """Of inputs with a told pool between two of queries, and context layers 4 and 1."""

    INPUTS = parse_inputs(["tail:1", "length", "head:2"], [2, 4], [4, 1])
    # Where each pool's columns lie, in threes: own, layer 4's, layer 1's.
    OWN, FOURTH, FIRST = (range(start, start + 3) for start in (0, 3, 6))

    def read(self, *places: tuple[int, int, float], routers: tuple[int, ...] = (0, 2, 3)) -> set:
        """Give routers one column each: (layer, pool's place, weight)."""
        first = torch.zeros(L, 4, self.INPUTS.vectors * H)
        for layer, place, weight in places:
            first[layer, 1, place * H + 2] = weight
        assert self.INPUTS.vectors == 9
        return self.INPUTS.layers_read(first, routers)

    def test_nothing(self) -> None:
        assert self.read() == set()

    @pytest.mark.parametrize("pool", [0, 2])
    def test_own_pools(self, pool: int) -> None:
        assert self.read((2, self.OWN[pool], 1e-30)) == {2}

    @pytest.mark.parametrize("pool", [0, 2])
    def test_context_layers(self, pool: int) -> None:
        assert self.read((2, self.FOURTH[pool], -1.0)) == {4}
        assert self.read((3, self.FIRST[pool], 1.0), (0, self.FOURTH[pool], 1.0)) == {1, 4}

    def test_what_is_told_is_no_query(self) -> None:
        told = [(0, places[1], 1.0) for places in (self.OWN, self.FOURTH, self.FIRST)]
        assert self.read(*told) == set()

    def test_a_router_that_decides_nothing(self) -> None:
        everything = [(1, place, 1.0) for place in range(9)]
        assert self.read(*everything) == set()
        assert self.read(*everything, routers=()) == set()
        assert self.read(*everything, routers=(1,)) == {1, 4}

    def test_a_weight_that_is_no_number_is_read(self) -> None:
        assert self.read((0, self.FIRST[0], float("nan"))) == {1}

    def test_against_a_router_that_is_told_one_feature_at_a_time(self) -> None:
        """What a router's output depends on, by trying: the columns of any parameters."""
        torch.manual_seed(0)
        inputs = parse_inputs(["tail:1", "length"], [2, 4], [3])
        router = LayerRouter(L, H, inputs.vectors, (8, 8, 8, 8)).requires_grad_(False)
        first = router.linear("features.0")[0]
        first[1:, :, : 2 * H] = 0  # own pools
        first[:, :, 2 * H : 3 * H] = 0  # layer 3's queries
        pooled = torch.randn(L, 2, H)
        found = set()
        for layer in range(L):
            changed = pooled.clone()
            changed[layer, 0] += 1
            each = [router.forward_all(inputs.assemble(p)[:, None]) for p in (pooled, changed)]
            found |= {layer} if not torch.equal(*each) else set()
        assert inputs.layers_read(first, range(L)) == found == {0}


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


@pytest.mark.parametrize("probe", [(0, 0), (-1, 8), (8,), (2**15, 1)], ids=str)
def test_no_probe(probe: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"head and tail, found \(.*\); together they are 1 to 32768"
    ):
        parse_inputs(["tail:1"], probe, [])


def test_a_pool_longer_than_the_probe() -> None:
    with pytest.raises(ValueError, match=r"at most 4 tokens \(tail\).*found tail:5; enlarge"):
        RouterInputs(pools=(Pool("tail", 5),), probe=Probe(8, 4))
    with pytest.raises(ValueError, match="at least one pool"):
        RouterInputs(pools=())
