"""Oracle: the model itself, with its own attention or with an explicit mask."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.patterns import make_pattern, triangle
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route
from training.attach import RoutedModel
from training.pattern_attention import PromptAttention, make_pattern_attention
from training.policies import CachedContextPolicy, RelaxedPolicy, StaticPolicy, ThresholdPolicy
from training.pooling import ChunkPlan, plan_chunks
from training.relaxation import logistic_noise
from training.standardize import StandardizedRouter

SINK, WINDOW, TOKENS = 4, 16, 60
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]


class Recorder:
    """A policy that keeps what it is shown and chooses FULL."""

    def __init__(self) -> None:
        self.features: list[torch.Tensor] = []

    def decide(self, layer: int, features: torch.Tensor) -> Route:
        self.features.append(features)
        return Route.FULL


class Constant:
    """A policy that answers with a tensor, as routers do."""

    def __init__(self, routes: torch.Tensor) -> None:
        self.routes = routes

    def decide(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        return self.routes[layer]


def prompts(rows: int = 2) -> tuple[torch.Tensor, ChunkPlan]:
    ids = torch.randint(1, 256, (rows, TOKENS))
    return ids, plan_chunks([[TOKENS]] * rows, TOKENS, 16)


@torch.no_grad()
def own_hidden(model: Any, ids: torch.Tensor, sparse_layers: set[int]) -> torch.Tensor:
    """Run the model's own code, SPARSE layers through a mask handed to each."""
    position = torch.arange(ids.shape[1])
    distance = position[:, None] - position[None]
    visible = (distance >= 0) & ((distance < WINDOW) | (position[None] < SINK))
    handles = []
    for layer in sparse_layers:

        def put_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"attention_mask": visible[None, None]}

        attention = model.model.layers[layer].self_attn
        handles.append(attention.register_forward_pre_hook(put_mask, with_kwargs=True))
    model.set_attn_implementation("sdpa")
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return hidden  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_routes_give_the_models_own_output(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    ids, plan = prompts()
    expected = {
        sparse: own_hidden(model, ids, sparse) for sparse in (frozenset(), frozenset({1, 3}))
    }
    routed = RoutedModel(model, SINK, WINDOW)
    for sparse, hidden in expected.items():
        policy = StaticPolicy([Route.SPARSE if i in sparse else Route.FULL for i in range(4)])
        with torch.no_grad():
            found = routed.forward(ids, plan, policy)
        torch.testing.assert_close(found.hidden, hidden, rtol=1e-3, atol=1e-3)
        assert found.routes.shape == (4, 2, 1)
    differ = (expected[frozenset()] - expected[frozenset({1, 3})]).abs().max()
    assert differ > 0.1  # the two cases tell apart
    routed.detach()
    torch.testing.assert_close(own_hidden(model, ids, set()), expected[frozenset()])


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_features_are_queries_before_rope(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    ids, _ = prompts(1)
    module = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    query = module.q_proj(hidden).view(1, TOKENS, 4, 8)
    query = module.q_norm(query) if family == "qwen3" else query
    expected = torch.cat([query[0, :16], query[0, -16:]]).mean(dim=(0, 1))
    recorder = Recorder()
    with torch.no_grad():
        routed = RoutedModel(model, SINK, WINDOW)
        routed.forward(ids, plan_chunks([[TOKENS]], TOKENS, 16), recorder)
    torch.testing.assert_close(recorder.features[0][0, 0], expected, rtol=1e-4, atol=1e-5)


def test_hard_and_soft_paths_agree_at_the_extremes(tiny_model: Callable[..., Any]) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    ids, plan = prompts(3)
    router = StandardizedRouter(LayerRouter(4, 8))
    noise = 30 * (torch.randint(0, 2, (4, 3, 1)) - 0.5)  # drowns the logits: surely FULL or SPARSE
    soft = routed.forward(ids, plan, RelaxedPolicy(router, noise, 1.0))
    assert soft.hidden.requires_grad
    assert torch.equal(soft.routes, (noise > 0).float())
    with torch.no_grad():
        hard = routed.forward(ids, plan, Constant((noise > 0).float()))
    torch.testing.assert_close(soft.hidden.detach(), hard.hidden, rtol=1e-4, atol=1e-4)
    for row in range(3):
        routes = [Route(int(route)) for route in (noise[:, row, 0] > 0)]
        with torch.no_grad():
            alone = routed.forward(ids[row : row + 1], prompts(1)[1], StaticPolicy(routes))
        torch.testing.assert_close(hard.hidden[row], alone.hidden[0], rtol=1e-4, atol=1e-4)


def test_triangle_is_trained_as_it_is_evaluated(tiny_model: Callable[..., Any]) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    ids, _ = prompts(2)
    ends, tail = [[TOKENS - 5], [30, TOKENS - 12]], 10
    trained = plan_chunks(ends, TOKENS, 16, tail_tokens=tail)
    noise = torch.full((4, 2, 2), -30.0)  # drowns the logits: surely SPARSE
    router = StandardizedRouter(LayerRouter(4, 8))
    soft = routed.forward(ids, trained, RelaxedPolicy(router, noise, 1.0))
    pattern = triangle.Pattern(sink_tokens=SINK, window_tokens=WINDOW, tail_tokens=tail)
    attend = make_pattern_attention(pattern, routed.sparse_attention, "sdpa")
    all_sparse = StaticPolicy([Route.SPARSE] * 4)
    with torch.no_grad():
        plan = plan_chunks(ends, TOKENS, 16)
        evaluated = routed.forward(ids, plan, all_sparse, PromptAttention(attend, ends, ids.device))
        streaming = routed.forward(ids, plan, all_sparse)
    torch.testing.assert_close(soft.hidden.detach(), evaluated.hidden, rtol=1e-4, atol=1e-4)
    assert (streaming.hidden - evaluated.hidden)[0, TOKENS - 15 :].abs().max() > 0.1


def test_each_chunk_is_attended_under_its_own_routes(tiny_model: Callable[..., Any]) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    ids, _ = prompts(1)
    plan = plan_chunks([[40, TOKENS]], TOKENS, 16)
    routes = torch.tensor([[[1.0, 0.0]]]).expand(4, 1, 2)  # FULL, then SPARSE
    with torch.no_grad():
        chunked = routed.forward(ids, plan, Constant(routes))
        full = routed.forward(ids, prompts(1)[1], StaticPolicy.all_full(4))
    torch.testing.assert_close(chunked.hidden[:, :40], full.hidden[:, :40], rtol=1e-4, atol=1e-4)
    assert (chunked.hidden[:, 40:] - full.hidden[:, 40:]).abs().max() > 0.1


def test_cached_context_policy_keeps_the_first_chunks_routes(
    tiny_model: Callable[..., Any],
) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    ids, _ = prompts(1)
    plan = plan_chunks([[40, TOKENS]], TOKENS, 16)
    cached = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    policy = CachedContextPolicy(StaticPolicy.all_full(4), cached)
    with torch.no_grad():
        found = routed.forward(ids, plan, policy)
    assert torch.equal(found.routes[:, 0, 0], cached[:, 0])
    assert (found.routes[:, 0, 1] == 1).all()


def test_gradients_reach_only_routers_and_weights_stay(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    routed = RoutedModel(model, SINK, WINDOW)
    router = StandardizedRouter(LayerRouter(4, 8))
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1)
    ids, plan = prompts()
    for seed in range(3):
        noise = logistic_noise((4, 2, 1), torch.Generator().manual_seed(seed))
        hidden = routed.forward(ids, plan, RelaxedPolicy(router, noise, 1.5)).hidden
        routed.logits(hidden[:, -1]).square().mean().backward()
        assert all(parameter.grad is not None for parameter in router.parameters())
        optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_training_under_another_pattern_is_refused(tiny_model: Callable[..., Any]) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    attend = make_pattern_attention(
        make_pattern("triangle", SINK, WINDOW), routed.sparse_attention, "sdpa"
    )
    ids, plan = prompts()
    sparse = PromptAttention(attend, [[TOKENS]] * 2, torch.device("cpu"))
    policy = RelaxedPolicy(StandardizedRouter(LayerRouter(4, 8)), torch.zeros(4, 2, 1), 1.0)
    with pytest.raises(UnsupportedConfigurationError, match="trained under 'streaming'"):
        routed.forward(ids, plan, policy, sparse)


def test_sparse_rows_attend_under_the_batchs_pattern(tiny_model: Callable[..., Any]) -> None:
    """Rows that differ in their routes, against each prompt alone under a static policy."""
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    attend = make_pattern_attention(
        triangle.Pattern(sink_tokens=SINK, window_tokens=WINDOW, tail_tokens=8),
        routed.sparse_attention,
        "sdpa",
    )
    ids, plan = prompts(3)
    chunk_ends = [[40], [50], [30]]
    routes = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 1]]).float()[:, :, None]
    with torch.no_grad():
        sparse = PromptAttention(attend, chunk_ends, ids.device)
        together = routed.forward(ids, plan, Constant(routes), sparse)
        streamed = routed.forward(ids, plan, Constant(routes))
        for row in range(3):
            policy = StaticPolicy([Route(int(route)) for route in routes[:, row, 0]])
            sparse = PromptAttention(attend, chunk_ends[row : row + 1], ids.device)
            alone = routed.forward(ids[row : row + 1], prompts(1)[1], policy, sparse)
            torch.testing.assert_close(together.hidden[row], alone.hidden[0], rtol=1e-4, atol=1e-4)
    assert (together.hidden - streamed.hidden).abs().amax(dim=(1, 2)).min() > 0.1


def test_recomputed_activations_give_the_same_gradients(tiny_model: Callable[..., Any]) -> None:
    router = StandardizedRouter(LayerRouter(4, 8))
    ids, plan = prompts()
    noise = logistic_noise((4, 2, 1), torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        routed = RoutedModel(tiny_model(), SINK, WINDOW)
        if recompute:
            routed.recompute_activations()
        result = routed.forward(ids, plan, RelaxedPolicy(router, noise, 1.5))
        loss = routed.logits(result.hidden[:, -1]).square().mean()
        gradients.append(torch.autograd.grad(loss, list(router.parameters())))
        assert result.features.shape == (4, 2, 1, 8)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_threshold_policy_decides_as_the_router_alone(tiny_model: Callable[..., Any]) -> None:
    routed = RoutedModel(tiny_model(), SINK, WINDOW)
    router = LayerRouter(4, 8).requires_grad_(False)
    ids, plan = prompts(5)
    for threshold in (0.0, 0.5, 1.0):
        found = routed.forward(ids, plan, ThresholdPolicy(router, threshold))
        probability = router.forward_all(found.features[:, :, 0]).softmax(dim=-1)[..., 1]
        assert torch.equal(found.routes[:, :, 0], (probability >= threshold).float())


def test_an_unsupported_model_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    with pytest.raises(UnsupportedConfigurationError, match="found GPT2LMHeadModel"):
        RoutedModel(model, SINK, WINDOW)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_windows_are_refused(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(
        family,
        sliding_window=32,
        **({"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}),
    )
    with pytest.raises(UnsupportedConfigurationError, match="sliding_window"):
        RoutedModel(model, SINK, WINDOW)
