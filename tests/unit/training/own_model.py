"""What the tests compare with: transformers' own code, whole, with masks and means by hand.

Dimension legend: L layers, B prompts, T tokens, N query heads, H head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch

from flux_vllm.router.inputs import RouterInputs
from tests.helpers.oracle import naive


def _mask(tokens: int, sink: int, window: int, route: int, tail: Sequence[int]) -> torch.Tensor:
    """Say which keys each query sees: [T, T] bool; those of `tail` see all up to their own."""
    mask = naive.prefill_mask(range(tokens), route, sink, window)
    mask[list(tail)] = naive.prefill_mask(range(tokens), naive.FULL, sink, window)[list(tail)]
    return mask


@torch.no_grad()
def own_hidden(
    model: Any,
    ids: torch.Tensor,
    routes: torch.Tensor,
    sink: int,
    window: int,
    tails: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """Run the model's own code, each layer with masks of its own.

    Args:
        model: without anything attached.
        ids: [B, T] int64.
        routes: [L, B], 1 for FULL.
        sink: of SPARSE.
        window: of SPARSE.
        tails: of each prompt, the queries that see everything.

    Returns: [B, T, D] last hidden states.
    """
    tokens = ids.shape[1]
    handles = []
    for layer, of_layer in zip(model.model.layers, routes, strict=True):
        masks = [
            _mask(tokens, sink, window, int(route), tails[row] if tails else ())
            for row, route in enumerate(of_layer)
        ]
        mask = torch.stack(masks)[:, None]

        def put_mask(module: Any, args: Any, kwargs: dict[str, Any], mask: Any = mask) -> Any:
            return args, kwargs | {"attention_mask": mask}

        handles.append(layer.self_attn.register_forward_pre_hook(put_mask, with_kwargs=True))
    model.set_attn_implementation("sdpa")
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return hidden  # type: ignore[no-any-return]


@torch.no_grad()
def own_features(model: Any, prompt: torch.Tensor, inputs: RouterInputs) -> torch.Tensor:
    """Give the features [L, F] of one prompt [tokens], by the words of `RouterInputs`.

    The model's own code runs over the prompt's ends, the tail after the head, at true positions.
    """
    head, tail = inputs.probe.head_tokens, inputs.probe.tail_tokens
    at = list(range(len(prompt)))
    if len(at) > head + tail:
        at = at[:head] + at[len(at) - tail :]
    queries: list[torch.Tensor] = []
    handles = []
    for layer in model.model.layers:
        attention = layer.self_attn
        module = getattr(attention, "q_norm", attention.q_proj)
        handles.append(module.register_forward_hook(lambda *call: queries.append(call[-1])))
    model.set_attn_implementation("sdpa")
    hidden = torch.full((len(at), len(at)), float("-inf")).triu(1)
    model.model(
        input_ids=prompt[at][None],
        position_ids=torch.tensor(at)[None],
        attention_mask=hidden[None, None],
        use_cache=False,
    )
    for handle in handles:
        handle.remove()
    heads = model.config.num_attention_heads
    pooled = []
    for query in queries:
        mean = query.reshape(len(at), heads, -1).mean(dim=1)
        vectors = []
        for pool in inputs.pools:
            first, latest = mean[: pool.tokens], mean[-pool.tokens :]
            chosen = {"head": first, "tail": latest, "ends": torch.cat([first, latest])}
            vectors.append(chosen[pool.kind].mean(dim=0))
        pooled.append(torch.cat(vectors))
    context = [pooled[layer] for layer in inputs.context_layers]
    return torch.stack([torch.cat([own, *context]) for own in pooled])
