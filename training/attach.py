"""Hang routers on a model of transformers: its own code runs, only attention is exchanged.

One seam carries everything: transformers' attention interface, through which each layer calls
`_routed_attention` instead of its own. In a probe a layer is called twice: once as the model has
it, and before that without RoPE, so that its queries before RoPE come by.

Dimension legend: B prompts, L layers that have a route, P pools, F features of a layer's router,
N query heads, T padded tokens, H head dim, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.router.inputs import RouterInputs
from training.attention_layers import call_without_rope, find_attention_layers, layers_with_route
from training.attention_sinks import attend_with_sinks
from training.probe import ProbeBatch
from training.routed_layers import RoutedLayers
from training.soft_attention import Attention, full_attention, make_sparse_attention, mix

if TYPE_CHECKING:
    from training.pattern_attention import PromptAttention

INTERFACE_NAME = "flux_routed"


@dataclass(slots=True)
class _Step:
    """What the layers of one forward pass share."""

    routes: torch.Tensor | None
    """[L, B]; None in a probe, which attends to everything."""
    is_tail: torch.Tensor | None = None
    """[B, T] bool: queries that attend to everything under both routes."""
    sparse: "PromptAttention | None" = None
    weights: torch.Tensor | None = None
    """[B, P, T] of a probe."""
    pooled: list[torch.Tensor] = field(default_factory=list)
    """[B, P, H] a layer that has a route, of a probe."""


@dataclass(slots=True)
class _Layer:
    """One layer's part; hangs on its attention module."""

    owner: "RoutedModel"
    place: int | None
    """Among the layers that have a route, its own or its keys' owner's; None: the layer attends as
    the model has it."""
    own_attention: Attention
    """To everything, or within the model's own sliding window."""
    is_looked_at: bool = False
    """While it is called without RoPE for its queries alone."""


class RoutedModel:
    """A frozen language model whose layers attend as they are told, prompt by prompt.

    Args:
        model: a causal language model of transformers whose attention goes through its attention
            interface; its weights are frozen and never written.
        sink_tokens: S of SPARSE attention.
        window_tokens: W of SPARSE attention.
        sparse_kernel: `flex` or `sdpa`.

    Raises: UnsupportedConfigurationError: a model whose attention routes cannot go with.
    """

    def __init__(
        self, model: Any, sink_tokens: int, window_tokens: int, sparse_kernel: str = "sdpa"
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.config = model.config.get_text_config()
        """Of the language model, where a model has other parts."""
        found = find_attention_layers(model)
        with_route = layers_with_route(model, found)
        self.layers = RoutedLayers(
            tuple(layer.number for layer in with_route), self.config.num_hidden_layers
        )
        self.num_layers = len(self.layers)
        """L: layers that have a route."""
        self.head_dim = with_route[0].head_dim
        self.sink_tokens = sink_tokens
        self.window_tokens = window_tokens
        self.sparse_kernel = sparse_kernel
        self.has_sinks = any(layer.has_sinks for layer in found)
        """Whether the model has learned attention sinks, which count as one more first token."""
        self.sparse_attention: Attention = make_sparse_attention(
            sparse_kernel, sink_tokens + self.has_sinks, window_tokens
        )
        self.step: _Step | None = None
        self._output_type: type[Any] = BaseModelOutputWithPast
        self._modules = [layer.module for layer in found]
        self._hooks = []
        own = {None: full_attention} | {
            window: make_sparse_attention(sparse_kernel, int(self.has_sinks), window)
            for window in {layer.window for layer in found}
            if window is not None
        }
        for layer in found:
            place = None
            if layer.window is None and layer.owner in self.layers.numbers:
                (place,) = self.layers.place([layer.owner], "a layer")
            layer.module.flux_layer = _Layer(self, place, own[layer.window])  # type: ignore[assignment]
            if layer in with_route:
                hook = layer.module.register_forward_pre_hook(_look, with_kwargs=True)
                self._hooks.append(hook)
        AttentionInterface.register(INTERFACE_NAME, _routed_attention)
        self._former = model.config._attn_implementation
        model.set_attn_implementation(INTERFACE_NAME)

    def detach(self) -> None:
        """Give the model back as it was (its weights stay frozen)."""
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            del module.flux_layer
        self.model.set_attn_implementation(self._former)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device  # type: ignore[no-any-return]

    @torch.no_grad()
    def probe(self, batch: ProbeBatch, inputs: RouterInputs) -> torch.Tensor:
        """Run the model over the prompts' ends alone.

        Args:
            batch: of the prompts, on the model's device.
            inputs: of the routers, which `batch` was cut for; context layers by their places.

        Returns: features [L, B, F] float32.
        """
        self.step = step = _Step(None, weights=batch.weights)
        self.model.base_model(
            input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False
        )
        return inputs.assemble(inputs.complete(torch.stack(step.pooled), batch.told))

    def forward(
        self,
        token_ids: torch.Tensor,
        routes: torch.Tensor,
        is_tail: torch.Tensor | None = None,
        sparse: "PromptAttention | None" = None,
    ) -> torch.Tensor:
        """Run the model once.

        Args:
            token_ids: [B, T] int64, padded at the end, on the model's device.
            routes: [L, B] float32, 1 for FULL and 0 for SPARSE; may pass gradients.
            is_tail: [B, T] bool: queries that attend to everything under both routes; None: none.
            sparse: of this batch, what SPARSE means; None: sinks and window everywhere.

        Returns: [B, T, D] last hidden states.
        Raises: UnsupportedConfigurationError: `sparse` given, and routes that pass gradients, or a
            model with attention sinks of its own.
        """
        if sparse is not None and self.has_sinks:
            raise UnsupportedConfigurationError(
                f"expected a model without attention sinks of its own to evaluate sparse patterns "
                f"on, found {type(self.model).__name__}; compare its routers by "
                "`python -m training divergence`"
            )
        if sparse is not None and routes.requires_grad:
            raise UnsupportedConfigurationError(
                "expected routers to be trained under 'streaming' or 'triangle', which is_tail "
                "tells, found another attention for SPARSE layers in training; train without "
                "`sparse` and evaluate the router under other patterns (--patterns)"
            )
        # Kept until the next call: recomputing activations in the backward pass reads it again.
        self.step = _Step(routes, is_tail, sparse)
        output = self.model.base_model(input_ids=token_ids, use_cache=False)
        self._output_type = type(output)
        return output[0]  # type: ignore[no-any-return]

    def recompute_activations(self) -> None:
        """Trade time for memory: keep one layer's activations at a time."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers checkpoints in training mode only. Not the whole model: dropout stays off.
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project hidden states of `forward` as the model's own code does, scaled or capped.

        Args:
            hidden: [..., D].

        Returns: [..., vocabulary] float32.
        """
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        with self._returning(flat):
            logits: torch.Tensor = self.model(input_ids=None, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1).float()

    @contextmanager
    def _returning(self, hidden: torch.Tensor) -> Iterator[None]:
        """Let the model below its head return hidden states that are known."""
        base = self.model.base_model
        base.forward = lambda *args, **kwargs: self._output_type(last_hidden_state=hidden)
        try:
            yield
        finally:
            del base.forward


def _look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call a layer of a running probe without RoPE, so that `_routed_attention` pools its query."""
    layer: _Layer = module.flux_layer  # type: ignore[assignment]
    step = layer.owner.step
    if step is None or step.weights is None:
        return
    layer.is_looked_at = True
    call_without_rope(module, args, kwargs)
    layer.is_looked_at = False


def _routed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attend as the running step's policy decides; transformers' attention interface.

    Args:
        module: the attention module, with its `flux_layer`.
        query: [B, N, T, H] after RoPE, which is none where a probe looks at it.
        key: [B, K, T, H].
        value: [B, K, T, H].
        attention_mask: None; padding stands at the end.
        scaling: of the scores.
        s_aux: [N], the model's own attention sinks.

    Returns: [B, T, N, H], and no weights.
    """
    layer: _Layer = module.flux_layer  # type: ignore[assignment]
    owner = layer.owner
    step = owner.step
    if step is None:
        raise RuntimeError("expected RoutedModel.forward to call the model; do not call it itself")
    states = (query, key, value)
    if layer.is_looked_at:
        assert step.weights is not None
        mean_query = query.mean(dim=1, dtype=torch.float32)
        step.pooled.append(torch.bmm(step.weights, mean_query))
        return query.transpose(1, 2), None
    if step.routes is None or layer.place is None:
        return _beside(layer.own_attention, s_aux)(*states, scaling).transpose(1, 2), None
    routes = step.routes[layer.place]
    if torch.is_grad_enabled() and routes.requires_grad:
        full = _beside(full_attention, s_aux)(*states, scaling)
        sparse = _beside(owner.sparse_attention, s_aux)(*states, scaling)
        out = mix(full, sparse, _by_token(routes, step, query.shape[2]))
    else:
        out = _attend_as_needed(owner, step, states, scaling, routes > 0.5, s_aux)
    return out.transpose(1, 2), None


def _beside(attention: Attention, sinks: torch.Tensor | None) -> Attention:
    """Let a kind of attention count a layer's own sinks [N], if it has any."""
    if sinks is None:
        return attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return attend_with_sinks(attention, (q, k, v), scale, sinks)

    return attend


def _by_token(routes: torch.Tensor, step: _Step, tokens: int) -> torch.Tensor:
    """Spread [B] routes over tokens: [B, T], 1 where both routes see everything."""
    z_BT = routes[:, None].expand(-1, tokens)
    return z_BT if step.is_tail is None else z_BT.masked_fill(step.is_tail, 1.0)


def _attend_as_needed(
    owner: RoutedModel,
    step: _Step,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scaling: float,
    is_full: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Compute for each prompt only the kind of attention that it chose: [B, N, T, H]."""
    out = torch.empty_like(states[0])
    full_rows = is_full.nonzero()[:, 0]
    sparse_rows = (~is_full).nonzero()[:, 0]
    for rows, is_sparse in ((full_rows, False), (sparse_rows, True)):
        if not len(rows):
            continue
        chosen = states
        if len(rows) < len(is_full):
            query, key, value = (state[rows] for state in states)
            chosen = (query, key, value)
        if is_sparse:
            found = _sparse(owner, step, chosen, scaling, rows, sinks)
        else:
            found = _beside(full_attention, sinks)(*chosen, scaling)
        if len(rows) == len(is_full):
            return found
        out = out.index_copy(0, rows, found)
    return out


def _sparse(
    owner: RoutedModel,
    step: _Step,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scaling: float,
    rows: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend some rows as SPARSE says: [rows, N, T, H]."""
    if step.sparse is not None:
        return step.sparse.select(rows.tolist())(*states, scaling)
    found = _beside(owner.sparse_attention, sinks)(*states, scaling)
    if step.is_tail is None:
        return found
    tail = step.is_tail[rows][:, None, :, None]
    return torch.where(tail, _beside(full_attention, sinks)(*states, scaling), found)
