"""The probe around a model that is a few lines of numpy: what it runs, pools, decides and keeps.

Oracle: the same queries pooled token by token in float64, and the router of one layer at a time.
Pinned: padding and whatever an earlier probe left in the buffers change nothing, to the bit; a
captured probe runs no Python of the model.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from flux_vllm.router.inputs import Pool, Probe, RouterInputs
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route, full_probability
from flux_vllm.routing.probe import ProbedLayer, ProbeDone, PromptProbe
from flux_vllm.routing.prompts import Prompt

CPU = torch.device("cpu")
L, N, H, D = 4, 3, 8, 2
ROUTED, CONTEXT = (0, 1, 3), 2
INPUTS = RouterInputs(
    pools=(Pool("tail", 3), Pool("ends", 4)), probe=Probe(6, 5), context_layers=(CONTEXT,)
)


class Rotary:
    """Stands in for RotaryInverse: adds positions to the first dimensions, and takes them away."""

    rotary_dim = 2 * D

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = np.repeat(positions[:, None], D, axis=1).astype(np.float32)
        return both, 2 * both

    def undo(self, query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        back = query.clone()
        back[..., :D] -= cos
        back[..., D : 2 * D] -= sin
        return back


class Model:
    """A model whose query is drawn by token id, layer and head, then "rotated"."""

    can_be_captured = False
    can_stop = True

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], list[int]]] = []
        self.layers: list[int] = []
        """Of the latest call, those that went on after their queries."""
        self.adapters: list[tuple[object, int]] = []

    def before_rope(self, token: int, layer: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * token + layer)
        return torch.randn(N, H, generator=generator)

    def __call__(
        self, metadata: dict[str, Any], token_ids: torch.Tensor, positions: torch.Tensor
    ) -> None:
        assert (token_ids.dtype, positions.dtype) == (torch.int32, torch.int64)
        self.calls.append((token_ids.tolist(), positions.tolist()))
        self.layers.clear()
        for layer in range(L):
            query = torch.stack([self.before_rope(token, layer) for token in token_ids.tolist()])
            query[..., :D] += positions[:, None, None]
            query[..., D : 2 * D] += 2 * positions[:, None, None]
            try:
                metadata[f"layer.{layer}"].keep(query)
            except ProbeDone:
                return
            self.layers.append(layer)

    def use_adapter(self, adapter: object | None, tokens: int) -> None:
        self.adapters.append((adapter, tokens))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return lambda: self.calls.append("replay")  # type: ignore[arg-type]


def make(
    model: Model,
    threshold: float = 0.5,
    reduce_mean: Any = lambda x: x,
    owners: dict[int, int] | None = None,
    read: Collection[int] = range(L),
) -> PromptProbe:
    router = LayerRouter(L, H, INPUTS.vectors).requires_grad_(False)
    rotary: Any = Rotary()
    layers = [
        ProbedLayer(
            f"layer.{i}", i, i in read, rotary if i in read else None, (owners or {}).get(i)
        )
        for i in range(L)
    ]
    routes = {i: (owners or {}).get(i, i) for i in ROUTED}
    torch.manual_seed(0)
    for parameter in router.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    columns = router.linear("features.0")[0].view(L, -1, 2, 2 * H)  # own pools, the context's
    for layer in set(range(L)) - set(read):
        columns[layer, :, 0] = 0
    if CONTEXT not in read:
        columns[:, :, 1] = 0
    probe = PromptProbe(INPUTS, router, threshold, layers, routes, model, reduce_mean, CPU)
    probe.router = router  # type: ignore[attr-defined]
    return probe


def prompt(length: int, name: str = "a") -> Prompt:
    tokens = torch.randint(1, 90, (length,), generator=torch.Generator().manual_seed(length))
    return Prompt(name, length, tokens.tolist())


def chosen(tokens: list[int]) -> list[int]:
    return tokens if len(tokens) <= 11 else [*tokens[:6], *tokens[-5:]]


def expected_probabilities(probe: PromptProbe, model: Model, tokens: list[int]) -> list[float]:
    ends = chosen(tokens)
    pooled = []
    for layer in range(L):
        means = [model.before_rope(token, layer).double().mean(dim=0) for token in ends]
        tail, both = means[-3:], means[:4] + means[-4:]
        pooled.append([sum(part) / len(part) for part in (tail, both)])
    found = []
    for layer in range(L):
        features = torch.cat([*pooled[layer], *pooled[CONTEXT]]).float()
        logits = probe.router(layer, features[None])  # type: ignore[attr-defined]
        found.append(float(full_probability(logits)[0]))
    return found


@pytest.mark.parametrize("length", [1, 2, 5, 10, 11, 12, 40])
def test_probabilities_and_routes(length: int) -> None:
    model = Model()
    probe, request = make(model), prompt(length)
    probe.decide(request)
    expected = expected_probabilities(probe, model, list(request.tokens or ()))
    for layer in range(L):
        got = float(probe.full_probability[layer])
        if layer in ROUTED:
            assert got == pytest.approx(expected[layer], abs=1e-6)
            assert int(probe.routes[layer]) == int(got >= 0.5)
        else:
            assert got != got
            assert int(probe.routes[layer]) == Route.UNDECIDED


def test_a_layer_with_anothers_keys_takes_its_route_too() -> None:
    alone, probe = make(Model()), make(Model(), owners={3: 1})
    for length in range(12, 30):
        for each in (alone, probe):
            each.decide(prompt(length))
        assert torch.equal(probe.routes[:2], alone.routes[:2])
        assert probe.routes[3] == probe.routes[1]
        assert probe.full_probability[3] == alone.full_probability[1]


def test_keys_of_an_owner() -> None:
    metadata = make(Model(), owners={3: 1})._metadata
    of_each = [torch.randn(2, 11, N, H) for _ in range(3)]
    for layer, own in enumerate(of_each):
        assert all(map(torch.equal, metadata[f"layer.{layer}"].to_attend(*own), own))
    assert all(map(torch.equal, metadata["layer.3"].to_attend(None, None), of_each[1]))


def test_tokens_at_their_own_positions_and_padding_at_the_end() -> None:
    model = Model()
    probe = make(model)
    probe.decide(Prompt("a", 3, [7, 8, 9]))
    probe.decide(Prompt("b", 30, list(range(30))))
    assert model.calls == [
        ([7, 8, 9] + [0] * 8, [0, 1, 2] + [0] * 8),
        ([0, 1, 2, 3, 4, 5, 25, 26, 27, 28, 29],) * 2,
    ]


def test_the_same_bits_whatever_was_probed_before() -> None:
    first = make(Model())
    first.decide(prompt(9))
    alone = first.full_probability.clone()
    second = make(Model())
    for length in (40, 9, 3, 9):
        second.decide(prompt(length))
        if length == 9:
            assert torch.equal(second.full_probability[[0, 1, 3]], alone[[0, 1, 3]])


def test_broken_query_is_full_in_that_layer() -> None:
    class Broken(Model):
        def before_rope(self, token: int, layer: int) -> torch.Tensor:
            query = super().before_rope(token, layer)
            return query * float("nan") if layer == 1 else query

    probe = make(Broken(), threshold=1.1)
    probe.decide(prompt(20))
    assert probe.routes.tolist() == [0, 1, -1, 0]
    assert probe.full_probability.isnan().tolist() == [False, True, True, False]


def test_mean_over_ranks_comes_before_the_router() -> None:
    shapes = []

    def reduce_mean(pooled: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(pooled.shape))
        return torch.zeros_like(pooled)

    probe = make(Model(), reduce_mean=reduce_mean)
    probe.decide(prompt(20))
    assert shapes == [(L, 2, H)]  # once, for all layers
    zeros = torch.zeros(1, INPUTS.vectors * H)
    expected = full_probability(probe.router(3, zeros))  # type: ignore[attr-defined]
    assert float(probe.full_probability[3]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("read", [{0, 1, 2, 3}, {1, 2}, {2}, {0, 3}, {0}, set()], ids=str)
def test_the_model_runs_until_the_last_layer_that_is_read(read: set[int]) -> None:
    stopping, whole = Model(), Model()
    whole.can_stop = False
    probes = [make(model, read=read) for model in (stopping, whole)]
    for length in (20, 7, 40):
        for probe in probes:
            probe.decide(prompt(length))
        assert stopping.layers == list(range(max(read, default=0)))
        assert whole.layers == list(range(L))
        first, second = ((p.routes, p.full_probability[list(ROUTED)]) for p in probes)
        assert all(map(torch.equal, first, second))
        expected = expected_probabilities(probes[0], stopping, list(prompt(length).tokens or ()))
        assert first[1].tolist() == pytest.approx([expected[i] for i in ROUTED], abs=1e-6)
    assert len(stopping.calls) == (3 if read else 0)
    assert len(whole.calls) == 3


def test_layers_that_are_not_read_keep_no_query() -> None:
    probe = make(Model(), read={2})
    probe._mean_query.fill_(7)
    probe.decide(prompt(20))
    assert [bool((kept == 7).all()) for kept in probe._mean_query] == [True, True, False, True]


@pytest.mark.parametrize(("threshold", "route"), [(0.0, Route.FULL), (1.0, Route.SPARSE)])
def test_threshold(threshold: float, route: Route) -> None:
    probe = make(Model(), threshold)
    probe.decide(prompt(20))
    assert probe.routes[list(ROUTED)].tolist() == [route] * 3


def test_set_threshold_reaches_a_captured_probe() -> None:
    class Traced(Model):
        can_be_captured = True

        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            # Like a CUDA graph: tensors stay, Python's numbers are what they were.
            def traced(value: torch.Tensor) -> torch.Tensor:
                work()
                return value

            graph = make_fx(traced)(torch.zeros(()))
            return lambda: graph(torch.zeros(()))

    probe = make(Traced())
    probe.capture()
    for threshold, route in ((0.0, Route.FULL), (1.0, Route.SPARSE), (0.0, Route.FULL)):
        probe.set_threshold(threshold)
        probe.decide(prompt(20))
        assert probe.routes[list(ROUTED)].tolist() == [route] * 3


def test_adapter_is_chosen_for_each_request() -> None:
    model = Model()
    probe = make(model)
    probe.decide(Prompt("a", 2, [1, 2], adapter="lora"))
    probe.decide(Prompt("b", 2, [1, 2]))
    assert model.adapters == [("lora", 11), (None, 11)]


def test_captured_probe_is_replayed() -> None:
    model = Model()
    model.can_be_captured = True
    probe = make(model)
    probe.capture()
    model.calls.clear()
    probe.decide(prompt(20))
    assert model.calls == ["replay"] * 2  # the model, and the routers
    assert probe._token_ids.tolist() == chosen(list(prompt(20).tokens or ()))


def test_model_that_cannot_be_captured_runs_each_time() -> None:
    model = Model()
    probe = make(model)
    probe.capture()
    assert model.calls == []
    probe.decide(prompt(20))
    assert len(model.calls) == 1
