"""Sinks of a model's own, under every kind of attention. Oracle: softmax over scores and sink."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.patterns import make_pattern
from tests.helpers.oracle import naive
from training.attach import RoutedModel
from training.attention_sinks import attend_with_sinks
from training.pattern_attention import PromptAttention, make_pattern_attention
from training.soft_attention import Attention, full_attention, make_sparse_attention

SINK, WINDOW, TOKENS = 4, 16, 60


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: Any, mask: torch.Tensor
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1] @ v


def mask_of(route: int, sink: int = SINK, window: int = WINDOW) -> torch.Tensor:
    return naive.prefill_mask(range(TOKENS), route, sink, window)


@pytest.mark.parametrize(
    ("attention", "mask"),
    [
        (full_attention, mask_of(naive.FULL)),
        (make_sparse_attention("sdpa", SINK + 1, WINDOW), mask_of(naive.SPARSE)),
        (make_sparse_attention("sdpa", 1, WINDOW), mask_of(naive.SPARSE, sink=0)),
    ],
    ids=["everything", "sinks and window", "a window of the model's own"],
)
def test_sinks_join_the_softmax_once(attention: Attention, mask: torch.Tensor) -> None:
    q = torch.randn(2, 4, TOKENS, 8)
    k, v = torch.randn(2, 2, 2, TOKENS, 8)
    sinks = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    found = attend_with_sinks(attention, (q, k, v), 0.3, sinks)
    torch.testing.assert_close(found, expected(q, k, v, 0.3, sinks, mask), rtol=1e-4, atol=1e-5)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=24,
        num_local_experts=2,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        pad_token_id=None,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in made.named_parameters():
        with torch.no_grad():
            if name.endswith("sinks"):
                weight.normal_()
            elif weight.dim() > 1:
                weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5)
    return made


@torch.no_grad()
def own_hidden(model: Any, ids: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
    """Run transformers' own attention; routes [2, B] of the two full layers, one mask for each."""
    model.set_attn_implementation("eager")
    handles = []
    for layer, of_layer in zip(model.model.layers[1::2], routes, strict=True):
        seen = torch.stack([mask_of(int(route)) for route in of_layer])[:, None]
        hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

        def put(module: Any, args: Any, kwargs: dict[str, Any], mask: Any = hidden) -> Any:
            return args, kwargs | {"attention_mask": mask}

        handles.append(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True))
    found = model.model(input_ids=ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return found  # type: ignore[no-any-return]


def test_a_model_with_sinks_attends_as_its_own_code(model: Any) -> None:
    ids = torch.randint(1, 256, (3, TOKENS))
    routes = torch.tensor([[1, 0, 0], [1, 0, 1]]).float()
    mixed = own_hidden(model, ids, routes)
    full = own_hidden(model, ids, torch.ones(2, 3))
    routed = RoutedModel(model, SINK, WINDOW)
    assert (routed.layers.numbers, routed.has_sinks) == ((1, 3), True)
    with torch.no_grad():
        hard = routed.forward(ids, routes)
    soft = routed.forward(ids, routes.clone().requires_grad_())
    torch.testing.assert_close(hard, mixed, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(soft.detach(), mixed, rtol=1e-3, atol=1e-3)
    assert (mixed - full).abs().amax(dim=(1, 2))[1:].min() > 0.05


def test_patterns_are_not_evaluated_with_sinks(model: Any) -> None:
    routed = RoutedModel(model, SINK, WINDOW)
    make: Callable[..., Any] = make_pattern_attention
    attend = make(make_pattern("streaming", SINK, WINDOW), routed.sparse_attention, "sdpa")
    sparse = PromptAttention(attend, [[TOKENS]], torch.device("cpu"))
    with pytest.raises(UnsupportedConfigurationError, match="training divergence"):
        routed.forward(torch.ones(1, TOKENS, dtype=torch.int64), torch.zeros(2, 1), sparse=sparse)
