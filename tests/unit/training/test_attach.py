"""Oracle: the model's own code, with its own attention or with explicit masks (`own_model`)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.patterns import make_pattern, triangle
from flux_vllm.router.inputs import parse_inputs
from flux_vllm.router.model import LayerRouter
from tests.unit.training.own_model import own_features, own_hidden
from training.attach import RoutedModel
from training.pattern_attention import PromptAttention, make_pattern_attention
from training.policies import RelaxedPolicy
from training.probe import collate_probes
from training.relaxation import logistic_noise
from training.standardize import StandardizedRouter

SINK, WINDOW, TOKENS = 4, 16, 60
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]
# Rows and layers all differ: FULL alone, SPARSE alone, and mixed both ways.
ROUTES = torch.tensor([[1, 0, 0], [1, 0, 1], [1, 0, 1], [1, 0, 0]]).float()
TAILS = [range(50, 58), range(0), range(20, 30)]
INPUTS = parse_inputs(["tail:1", "tail:4", "head:6", "ends:3"], [6, 10], [0, 3])


def prompts(rows: int = 3) -> torch.Tensor:
    return torch.randint(1, 256, (rows, TOKENS))


def marked(tails: list[range]) -> torch.Tensor:
    is_tail = torch.zeros(len(tails), TOKENS, dtype=torch.bool)
    for row, tail in zip(is_tail, tails, strict=True):
        row[tail.start : tail.stop] = True
    return is_tail


def relaxed(rows: int, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, LayerRouter]:
    """Sample routes [4, rows] of a fresh router, which they pass gradients to."""
    router = StandardizedRouter(LayerRouter(4, 8))
    if noise is None:
        noise = logistic_noise((4, rows), torch.Generator().manual_seed(0))
    routes = RelaxedPolicy(router, noise, 1.5).decide(torch.randn(4, rows, 8))
    return routes, router.router


def attended(routed: RoutedModel, pattern: Any, lens: list[int]) -> PromptAttention:
    attend = make_pattern_attention(pattern, routed.sparse_attention, "sdpa")
    return PromptAttention(attend, [[length] for length in lens], torch.device("cpu"))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_routes_give_the_models_own_output(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    ids = prompts()
    cases = [(ROUTES, None), (ROUTES, TAILS), (torch.ones(4, 3), TAILS)]
    expected = [
        own_hidden(model, ids, routes, SINK, WINDOW, tails)  # type: ignore[arg-type]
        for routes, tails in cases
    ]
    plain = own_hidden(model, ids, torch.ones(4, 3), SINK, WINDOW)
    routed = RoutedModel(model, SINK, WINDOW)
    for (routes, tails), hidden in zip(cases, expected, strict=True):
        is_tail = None if tails is None else marked(tails)
        with torch.no_grad():
            hard = routed.forward(ids, routes, is_tail)
        soft = routed.forward(ids, routes.clone().requires_grad_(), is_tail)
        assert soft.requires_grad
        torch.testing.assert_close(hard, hidden, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(soft.detach(), hidden, rtol=1e-3, atol=1e-3)
    # The cases tell apart, by rows whose routes or tails do.
    assert (expected[0] - plain).abs().amax(dim=(1, 2))[1:].min() > 0.1
    assert (expected[1] - expected[0]).abs().amax(dim=(1, 2))[2] > 0.1
    assert torch.equal(expected[2], plain)
    routed.detach()
    found = own_hidden(model, ids, torch.ones(4, 3), SINK, WINDOW)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_features_are_means_of_queries_before_rope(
    family: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(family)
    ids = prompts(6)
    # Shorter than a pool, than an end, than the probe; as long; one longer; much longer.
    asked = [row[:length] for row, length in zip(ids, [1, 5, 13, 16, 17, 60], strict=True)]
    expected = torch.stack([own_features(model, prompt, INPUTS) for prompt in asked], dim=1)
    routed = RoutedModel(model, SINK, WINDOW)
    found = routed.probe(collate_probes([row.numpy() for row in asked], INPUTS), INPUTS)
    assert found.shape == (4, 6, INPUTS.vectors * 8)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_probes_tokens_attend_at_their_true_positions(tiny_model: Callable[..., Any]) -> None:
    """The tail after the head, neither beside it nor moved up to it."""
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    ids = prompts(1)[0].numpy()
    batch = collate_probes([ids], INPUTS)
    found = routed.probe(batch, INPUTS)
    moved = collate_probes([ids], INPUTS)
    moved.positions.copy_(torch.arange(16))
    assert (routed.probe(moved, INPUTS) - found)[1:].abs().max() > 0.01
    other_head = collate_probes([ids], INPUTS)
    other_head.token_ids[:, :6] = 7
    tail = slice(8, 16)  # of the own pools, tail:4
    assert (routed.probe(other_head, INPUTS) - found)[1:, :, tail].abs().max() > 0.01


def test_a_probe_looks_neither_at_routes_nor_at_what_ran_before(
    tiny_model: Callable[..., Any],
) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    ids = prompts()
    batch = collate_probes(list(ids.numpy()), INPUTS)
    first = routed.probe(batch, INPUTS)
    routed.forward(ids, torch.zeros(4, 3), marked(TAILS))
    assert torch.equal(routed.probe(batch, INPUTS), first)


def test_hard_and_soft_paths_agree_at_the_extremes(tiny_model: Callable[..., Any]) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    ids = prompts()
    noise = 30 * (torch.randint(0, 2, (4, 3)) - 0.5)  # drowns the logits: surely FULL or SPARSE
    routes, _ = relaxed(3, noise)
    assert torch.equal(routes, (noise > 0).float())
    soft = routed.forward(ids, routes, marked(TAILS))
    assert soft.requires_grad
    with torch.no_grad():
        hard = routed.forward(ids, routes, marked(TAILS))
        torch.testing.assert_close(soft.detach(), hard, rtol=1e-4, atol=1e-4)
        for row in range(3):
            one = slice(row, row + 1)
            alone = routed.forward(ids[one], routes[:, one], marked(TAILS)[one])
            torch.testing.assert_close(hard[one], alone, rtol=1e-4, atol=1e-4)


def test_triangle_is_trained_as_it_is_evaluated(tiny_model: Callable[..., Any]) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    ids = prompts(2)
    lens, tail = [TOKENS - 5, TOKENS - 12], 10
    is_tail = marked([range(length - tail, length) for length in lens])
    noise = torch.full((4, 2), -30.0)  # surely SPARSE
    trained = routed.forward(ids, relaxed(2, noise)[0], is_tail)
    pattern = triangle.Pattern(sink_tokens=SINK, window_tokens=WINDOW, tail_tokens=tail)
    routes = torch.zeros(4, 2)
    with torch.no_grad():
        evaluated = routed.forward(ids, routes, sparse=attended(routed, pattern, lens))
        streaming = routed.forward(ids, routes)
    torch.testing.assert_close(trained.detach(), evaluated, rtol=1e-4, atol=1e-4)
    assert (streaming - evaluated)[0, TOKENS - 15 :].abs().max() > 0.1


def test_gradients_are_those_of_the_mixture(tiny_model: Callable[..., Any]) -> None:
    """Against differences of the outputs of mixtures on both sides; norms are float32 inside."""
    routed = RoutedModel(tiny_model().double(), SINK, WINDOW)
    ids, is_tail = prompts(2), marked([range(40, 45), range(0)])
    weight = torch.randn(2, TOKENS, 32, dtype=torch.float64)

    def loss(routes: torch.Tensor) -> torch.Tensor:
        return (routed.forward(ids, routes.requires_grad_(), is_tail) * weight).sum()

    routes = torch.rand(4, 2, dtype=torch.float64)
    found = torch.autograd.grad(loss(routes), routes)[0]
    routes = routes.detach()
    for place in ((0, 0), (2, 1), (3, 0)):
        step = torch.zeros(4, 2, dtype=torch.float64)
        step[place] = 1e-3
        difference = loss(routes + step).item() - loss(routes - step).item()
        assert found[place].item() == pytest.approx(difference / 2e-3, rel=1e-2)


def test_gradients_reach_only_routers_and_weights_stay(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    routed = RoutedModel(model, SINK, WINDOW)
    router = StandardizedRouter(LayerRouter(4, 8, INPUTS.vectors, (8, 8, 8, 8)))
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1)
    ids = prompts()
    features = routed.probe(collate_probes(list(ids.numpy()), INPUTS), INPUTS)
    assert not features.requires_grad
    for seed in range(3):
        noise = logistic_noise((4, 3), torch.Generator().manual_seed(seed))
        routes = RelaxedPolicy(router, noise, 1.5).decide(features)
        routed.logits(routed.forward(ids, routes)[:, -1]).square().mean().backward()
        assert all(parameter.grad is not None for parameter in router.parameters())
        optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_logits_are_the_models_own(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    ids = prompts()
    with torch.no_grad():
        expected = model(ids).logits
        routed = RoutedModel(model, SINK, WINDOW)
        found = routed.logits(routed.forward(ids, torch.ones(4, 3)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_sparse_rows_attend_under_the_batchs_pattern(tiny_model: Callable[..., Any]) -> None:
    """Rows that differ in their routes, against masks of the same tails."""
    model = tiny_model()
    ids, lens = prompts(), [40, 50, 30]
    tails = [range(length - 8, length) for length in lens]
    expected = own_hidden(model, ids, ROUTES, SINK, WINDOW, tails)
    streamed = own_hidden(model, ids, ROUTES, SINK, WINDOW)
    routed = RoutedModel(model, SINK, WINDOW)
    pattern = triangle.Pattern(sink_tokens=SINK, window_tokens=WINDOW, tail_tokens=8)
    with torch.no_grad():
        found = routed.forward(ids, ROUTES, sparse=attended(routed, pattern, lens))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (expected - streamed).abs().amax(dim=(1, 2))[1:].min() > 0.1


def test_recomputed_activations_give_the_same_gradients(tiny_model: Callable[..., Any]) -> None:
    ids = prompts(2)
    batch = collate_probes(list(ids.numpy()), INPUTS)
    routes, router = relaxed(2)
    gradients, features = [], []
    for recompute in (False, True):
        routed = RoutedModel(tiny_model(), SINK, WINDOW)
        if recompute:
            routed.recompute_activations()
        features.append(routed.probe(batch, INPUTS))
        hidden = routed.forward(ids, routes, marked([range(40, 50), range(0)]))
        loss = routed.logits(hidden[:, -1]).square().mean()
        parameters = list(router.parameters())
        gradients.append(torch.autograd.grad(loss, parameters, retain_graph=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(*features)


def test_training_under_another_pattern_is_refused(tiny_model: Callable[..., Any]) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    sparse = attended(routed, make_pattern("triangle", SINK, WINDOW), [TOKENS] * 3)
    with pytest.raises(UnsupportedConfigurationError, match="trained under 'streaming'"):
        routed.forward(prompts(), relaxed(3)[0], sparse=sparse)


def test_a_model_called_by_itself_is_refused(tiny_model: Callable[..., Any]) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    with pytest.raises(RuntimeError, match=r"expected RoutedModel\.forward to call the model"):
        routed.model(prompts())
