"""The router's network against torch.nn.Sequential, and the rule from logits to a route.

Oracle: `torch.nn.Sequential` with the same weights, built from the paper. Pinned: no
SiLU between `features.2` and `head.0`; at a tie of P(FULL) and the threshold the route is FULL.
"""

import pytest
import torch
from torch import nn

from flux_vllm.router.model import LayerRouter, linear_shapes
from flux_vllm.router.route import Route, choose_route, full_probability

SIZES = [(1, 8), (3, 16), (5, 64)]


def sequential(router: LayerRouter, layer: int) -> nn.Sequential:
    d = router.head_dim
    network = nn.Sequential(
        nn.Sequential(nn.Linear(d, 8 * d), nn.SiLU(), nn.Linear(8 * d, 2 * d)),
        nn.Sequential(
            nn.Linear(2 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU(), nn.Linear(d, 2)
        ),
    )
    state = {}
    for ours, theirs in {
        "features.0": "0.0",
        "features.2": "0.2",
        "head.0": "1.0",
        "head.2": "1.2",
        "head.4": "1.4",
    }.items():
        weight, bias = router.linear(ours)
        state |= {f"{theirs}.weight": weight[layer], f"{theirs}.bias": bias[layer]}
    network.load_state_dict(state)
    return network


@pytest.fixture(params=SIZES, ids=lambda size: f"L{size[0]}-H{size[1]}")
def router(request: pytest.FixtureRequest) -> LayerRouter:
    router = LayerRouter(*request.param).requires_grad_(False)
    for parameter in router.parameters():  # larger than at initialisation, so that SiLU bends
        parameter.data.mul_(3)
    return router


class TestLayerRouter:
    def test_equals_sequential(self, router: LayerRouter) -> None:
        x = 2 * torch.randn(6, router.head_dim)
        for layer in range(router.num_layers):
            expected = sequential(router, layer)(x)
            torch.testing.assert_close(router(layer, x), expected, rtol=1e-5, atol=1e-5)
            assert expected.abs().max() > 0.3

    def test_forward_all_equals_forward(self, router: LayerRouter) -> None:
        x = 2 * torch.randn(router.num_layers, 6, router.head_dim)
        logits = router.forward_all(x)
        assert logits.shape == (router.num_layers, 6, 2)
        for layer in range(router.num_layers):
            torch.testing.assert_close(logits[layer], router(layer, x[layer]), rtol=1e-5, atol=1e-5)

    def test_rows_do_not_mix(self, router: LayerRouter) -> None:
        x = torch.randn(4, router.head_dim)
        together = router(0, x)
        poisoned = x.clone()
        poisoned[1] = float("nan")
        found = router(0, poisoned)
        assert found[1].isnan().all()
        torch.testing.assert_close(found[[0, 2, 3]], together[[0, 2, 3]])

    def test_no_rows(self, router: LayerRouter) -> None:
        assert router(0, torch.empty(0, router.head_dim)).shape == (0, 2)

    def test_input_of_another_dtype(self, router: LayerRouter) -> None:
        x = torch.randn(2, router.head_dim).bfloat16()
        assert torch.equal(router(0, x), router(0, x.float()))
        assert torch.equal(
            router.forward_all(x.expand(router.num_layers, -1, -1)),
            router.forward_all(x.float().expand(router.num_layers, -1, -1)),
        )

    def test_every_parameter_counts(self, router: LayerRouter) -> None:
        """A layer's logits depend on all of its own parameters and on no other layer's."""
        layer = router.num_layers - 1
        own = LayerRouter(router.num_layers, router.head_dim)
        own(layer, torch.randn(3, router.head_dim)).square().sum().backward()
        assert len(list(own.parameters())) == 10
        for name, parameter in own.named_parameters():
            assert parameter.grad[layer].abs().max() > 0, name
            assert not parameter.grad[:layer].any(), name


def test_linear_shapes() -> None:
    assert linear_shapes(128) == {
        "features.0": (1024, 128),
        "features.2": (256, 1024),
        "head.0": (512, 256),
        "head.2": (128, 512),
        "head.4": (2, 128),
    }


class TestRoute:
    def test_columns(self) -> None:
        assert (Route.UNDECIDED, Route.SPARSE, Route.FULL) == (-1, 0, 1)

    def test_probability_is_the_full_columns(self) -> None:
        logits = torch.tensor([[0.0, 0.0], [1.0, 3.0], [3.0, 1.0], [-100.0, 100.0], [50.0, -50.0]])
        expected = torch.sigmoid(logits[:, 1] - logits[:, 0])
        torch.testing.assert_close(full_probability(logits), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_probability_is_float32(self, dtype: torch.dtype) -> None:
        logits = torch.tensor([[[0.125, 0.25]], [[2.0, -2.0]]], dtype=dtype)
        found = full_probability(logits)
        assert found.dtype == torch.float32
        assert found.shape == (2, 1)
        assert torch.equal(found, full_probability(logits.float()))

    @pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.75, 1.0], ids=lambda t: f"t{t}")
    def test_threshold(self, threshold: float) -> None:
        probability = torch.tensor([0.0, 0.2, 0.25, 0.26, 0.5, 0.75, 0.9, 1.0])
        routes = choose_route(probability, threshold)
        assert routes.dtype == torch.int8
        assert routes.tolist() == [
            int(Route.FULL if p >= threshold else Route.SPARSE) for p in probability.tolist()
        ]

    def test_tie_is_full(self) -> None:
        probability = full_probability(torch.tensor([[0.7, 0.7], [-9.0, -9.0]]))
        assert choose_route(probability, 0.5).tolist() == [Route.FULL, Route.FULL]

    def test_next_below_the_threshold_is_sparse(self) -> None:
        below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
        assert choose_route(below, 0.5).item() == Route.SPARSE

    def test_half_is_the_argmax(self) -> None:
        logits = torch.randn(500, 2)
        routes = choose_route(full_probability(logits), 0.5)
        assert torch.equal(routes.long(), logits.argmax(dim=-1))

    def test_ends_of_the_range(self) -> None:
        """0 makes every layer FULL; 1 leaves FULL what is certain beyond float32."""
        probability = full_probability(torch.tensor([[0.0, -200.0], [0.0, 3.0], [0.0, 200.0]]))
        assert choose_route(probability, 0.0).tolist() == [1, 1, 1]
        assert choose_route(probability, 1.0).tolist() == [0, 0, 1]

    @pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0], ids=lambda t: f"t{t}")
    @pytest.mark.parametrize(
        "logits", [(float("nan"), 0.0), (float("inf"), 0.0), (0.0, float("inf"))], ids=str
    )
    def test_logits_that_are_not_finite_are_full(
        self, logits: tuple[float, float], threshold: float
    ) -> None:
        """The safe route, whichever logit it is."""
        probability = full_probability(torch.tensor([logits, (2.0, 1.0)]))
        assert probability.isnan().tolist() == [True, False]
        assert choose_route(probability, threshold)[0] == Route.FULL
