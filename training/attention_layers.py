"""The attention layers of a transformers model, found by running a few tokens through it.

What reaches transformers' attention interface tells all that matters: which modules attend, within
which window of the model's own, and, by a second call without RoPE, how their queries are rotated.
Which layers get a route follows the server's rules (`flux_vllm/startup/layers.py`).

Dimension legend: B prompts, N query heads, K kv heads, T tokens, H head dim, D hidden size.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from flux_vllm.errors import UnsupportedConfigurationError

_TRIAL_NAME = "flux_trial"
_TOKENS = 8
_SAME = 0.01
"""Largest difference of equal queries, as a share of the largest number in them."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer of a model."""

    module: nn.Module
    number: int
    """Of the model's layer, as the server counts."""
    head_dim: int
    window: int | None
    """Tokens of the model's own sliding window, the query's own included; None: full attention."""
    rotates: bool
    """Whether RoPE rotates its queries."""
    has_sinks: bool
    """Whether it has learned attention sinks of its own."""
    owner: int
    """Number of the layer whose keys it attends to, and whose route it takes; mostly its own."""


def call_without_rope(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let a module attend with queries as they are before RoPE, whatever form its RoPE has.

    A model hands cos and sin to its attention modules; those of the angle 0 rotate nothing.

    Args:
        module: an attention module.
        args: of its call.
        kwargs: of its call.
    """
    given = kwargs.get("position_embeddings")
    if isinstance(given, torch.Tensor):  # cos + i sin
        kwargs = kwargs | {"position_embeddings": torch.ones_like(given)}
    elif given is not None:
        cos, sin = given
        unmoved = (torch.ones_like(cos), torch.zeros_like(sin))
        kwargs = kwargs | {"position_embeddings": unmoved}
    # Past the hooks, one of which makes this call.
    module.forward(*args, **kwargs)


def find_attention_layers(model: Any) -> list[AttentionLayer]:
    """Find the attention layers of a model, in order, by running a few tokens.

    Args:
        model: a causal language model of transformers.

    Raises: UnsupportedConfigurationError: attention that routers cannot be trained for.
    """
    kind, config = type(model).__name__, model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise _unsupported(kind, "a model that is told its tokens' positions", "none")
    trial = _Trial(config.max_position_embeddings)
    AttentionInterface.register(_TRIAL_NAME, trial.attend)
    former = model.config._attn_implementation
    model.set_attn_implementation(_TRIAL_NAME)
    try:
        calls, looks = trial.run(model)
    finally:
        model.set_attn_implementation(former)
        trial.calls.clear()  # the interface keeps the trial
    if not calls:
        raise _unsupported(kind, "attention through transformers' attention interface", "none")
    owners: dict[int, int] = {}
    layers = []
    for call, look, other in zip(calls, looks[::2], looks[1::2], strict=True):
        number: Any = getattr(call.module, "layer_idx", None)
        owner = owners.setdefault(call.key.data_ptr(), number)  # the trial keeps all keys
        layers.append(_describe(kind, config, call, look, other, owner))
    numbers = [layer.number for layer in layers]
    if numbers != sorted(set(numbers)):
        raise _unsupported(kind, "one attention module a layer", f"those of layers {numbers}")
    return layers


def layers_with_route(model: Any, layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """Choose the layers that routers decide for: of full attention, with RoPE and their own keys.

    In a model without any RoPE all those of full attention are chosen.

    Raises: UnsupportedConfigurationError: there is none, or their heads differ in size.
    """
    kind = type(model).__name__
    windowed = {layer.number for layer in layers if layer.window is not None}
    full = [layer for layer in layers if not {layer.number, layer.owner} & windowed]
    if not full:
        raise UnsupportedConfigurationError(
            f"expected layers with full attention in {kind}, found sliding_window="
            f"{layers[0].window} in all of them; set sliding_window to null in its config if the "
            "model was trained for full attention"
        )
    if any(layer.rotates for layer in layers):
        full = [layer for layer in full if layer.rotates]
    if not full:
        raise _unsupported(
            kind, "RoPE in layers with full attention", "it in layers with a sliding window alone"
        )
    full = [layer for layer in full if layer.owner == layer.number]
    sizes = sorted({layer.head_dim for layer in full})
    if len(sizes) > 1:
        raise _unsupported(kind, "heads of one size in layers with full attention", str(sizes))
    return full


@dataclass(slots=True)
class _Call:
    """One call of transformers' attention interface."""

    module: nn.Module
    query: torch.Tensor
    """[B, N, T, H]."""
    key: torch.Tensor
    """[B, K, T, H]."""
    value: torch.Tensor
    mask: torch.Tensor | None
    options: dict[str, Any]


@dataclass(slots=True)
class _Trial:
    """Runs a model whose attention gives zeros, and keeps what attention was called with."""

    most_positions: int
    calls: list[_Call] = field(default_factory=list)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Keep a call; transformers' attention interface."""
        self.calls.append(_Call(module, query, key, value, attention_mask, options))
        return value.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[-1]), None

    @torch.no_grad()
    def run(self, model: Any) -> tuple[list[_Call], list[_Call]]:
        """Run a few tokens at positions as far apart as the model knows.

        Returns: the calls that attend, in order; and two more of each, both without RoPE: of the
            same hidden states, and of one token's at all positions.
        """
        positions = torch.linspace(0, self.most_positions - 1, _TOKENS, device=model.device)
        tokens = torch.arange(_TOKENS, device=model.device)[None]
        inputs = {"input_ids": tokens, "position_ids": positions.long()[None], "use_cache": False}
        model.base_model(**inputs)
        hooks = [
            call.module.register_forward_pre_hook(_call_twice_more, with_kwargs=True)
            for call in self.calls
        ]
        self.calls.clear()
        try:
            model.base_model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        looks = [call for at, call in enumerate(self.calls) if at % 3 != 2]
        return self.calls[2::3], looks


def _call_twice_more(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call_without_rope(module, args, kwargs)
    if args:
        args = (_of_one_token(args[0]), *args[1:])
    else:
        kwargs = kwargs | {"hidden_states": _of_one_token(kwargs["hidden_states"])}
    call_without_rope(module, args, kwargs)


def _of_one_token(hidden: torch.Tensor) -> torch.Tensor:
    """Put the first token's hidden states [B, T, D] in the place of all."""
    return hidden[:, :1].expand_as(hidden).contiguous()


def _describe(
    kind: str, config: Any, call: _Call, unrotated: _Call, unmoving: _Call, owner: int
) -> AttentionLayer:
    """Make a layer of its call, that without RoPE, and that of one token's hidden states."""
    number = getattr(call.module, "layer_idx", None)
    where = f"{type(call.module).__name__} of layer {number}"
    window = call.options.get("sliding_window")
    kinds = getattr(config, "layer_types", None)
    own_kind = kinds[number] if kinds and number is not None else None
    same = _SAME * unmoving.query.abs().max()
    expected, found = "", ""
    if number is None or not getattr(call.module, "is_causal", True):
        expected, found = "causal attention of numbered layers alone", where
    elif call.query.shape[3] != call.value.shape[3] or call.query.shape[2] != call.key.shape[2]:
        expected = "a key and a value of the query's size for every token"
        found = f"a query {list(call.query.shape)} with keys {list(call.key.shape)} and values "
        found += f"{list(call.value.shape)} in {where}"
    elif call.options.get("softcap") is not None:
        expected, found = "scores as they are", f"softcap={call.options['softcap']} in {where}"
    elif call.mask is not None or own_kind == "chunked_attention":
        expected, found = "causal or sliding-window attention", f"a mask of its own in {where}"
    elif own_kind == "sliding_attention" and window is None:
        expected, found = "sliding windows told to the attention interface", f"none in {where}"
    elif not (unmoving.query - unmoving.query[:, :, :1]).abs().max() <= same:
        expected = "queries that depend on the position by the model's `position_embeddings` alone"
        found = f"others in {where}, which the server refuses or which are out of reach here"
    if found:
        raise _unsupported(kind, expected, found)
    assert isinstance(number, int)
    rotates = not torch.equal(unrotated.query, call.query)
    has_sinks = call.options.get("s_aux") is not None
    return AttentionLayer(
        call.module, number, call.query.shape[3], window, rotates, has_sinks, owner
    )


def _unsupported(kind: str, expected: str, found: str) -> UnsupportedConfigurationError:
    return UnsupportedConfigurationError(
        f"expected {expected} in {kind}, found {found}; routers cannot be trained for this model"
    )
