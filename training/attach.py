"""Hang routers on a model of transformers: its own code runs, only attention is exchanged.

Two seams carry everything: transformers' attention interface, through which each layer calls
`_routed_attention` instead of its own, and a forward hook on the module that gives the query
before RoPE (`q_proj`, or `q_norm` where the model normalises queries).

Dimension legend: B prompts, L layers, P pools, F features of a layer's router, N query heads,
T padded tokens, H head dim, D hidden size.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.router.inputs import RouterInputs
from training.probe import ProbeBatch
from training.soft_attention import Attention, full_attention, make_sparse_attention, mix

if TYPE_CHECKING:
    from training.pattern_attention import PromptAttention

INTERFACE_NAME = "flux_routed"

QUERY_MODULES = {
    "LlamaForCausalLM": "q_proj",
    "MistralForCausalLM": "q_proj",
    "Qwen2ForCausalLM": "q_proj",
    "Qwen3ForCausalLM": "q_norm",
}
"""Supported architectures, and the submodule whose output is the query before RoPE."""


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
    """[B, P, H] a layer, of a probe."""


@dataclass(slots=True)
class _Layer:
    """One layer's part; hangs on its attention module."""

    owner: "RoutedModel"


class RoutedModel:
    """A frozen language model whose layers attend as they are told, prompt by prompt.

    Args:
        model: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM; its
            weights are frozen and never written.
        sink_tokens: S of SPARSE attention.
        window_tokens: W of SPARSE attention.
        sparse_kernel: `flex` or `sdpa`.

    Raises: UnsupportedConfigurationError: another architecture, or layers with a sliding window.
    """

    def __init__(
        self, model: Any, sink_tokens: int, window_tokens: int, sparse_kernel: str = "sdpa"
    ) -> None:
        query_module = check_supported(model)
        self.model = model.requires_grad_(False).eval()
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self.sink_tokens = sink_tokens
        self.window_tokens = window_tokens
        self.sparse_kernel = sparse_kernel
        self.sparse_attention: Attention = make_sparse_attention(
            sparse_kernel, sink_tokens, window_tokens
        )
        self.step: _Step | None = None
        self._hooks = []
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.flux_layer = _Layer(self)
            module = getattr(attention, query_module)
            self._hooks.append(module.register_forward_hook(_QueryHook(attention.flux_layer)))
        AttentionInterface.register(INTERFACE_NAME, _routed_attention)
        self._former = config._attn_implementation
        model.set_attn_implementation(INTERFACE_NAME)

    def detach(self) -> None:
        """Give the model back as it was (its weights stay frozen)."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.model.model.layers:
            del layer.self_attn.flux_layer
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
            inputs: of the routers, which `batch` was cut for.

        Returns: features [L, B, F] float32.
        """
        self.step = step = _Step(None, weights=batch.weights)
        self.model.model(input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False)
        return inputs.assemble(torch.stack(step.pooled) + batch.offsets[..., None])

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
        Raises: UnsupportedConfigurationError: `sparse` given, and routes that pass gradients.
        """
        if sparse is not None and routes.requires_grad:
            raise UnsupportedConfigurationError(
                "expected routers to be trained under 'streaming' or 'triangle', which is_tail "
                "tells, found another attention for SPARSE layers in training; train without "
                "`sparse` and evaluate the router under other patterns (--patterns)"
            )
        # Kept until the next call: recomputing activations in the backward pass reads it again.
        self.step = _Step(routes, is_tail, sparse)
        hidden: torch.Tensor = self.model.model(input_ids=token_ids, use_cache=False)[0]
        return hidden

    def recompute_activations(self) -> None:
        """Trade time for memory: keep one layer's activations at a time."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()  # transformers checkpoints in training mode only; nothing else differs

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project hidden states [..., D] to float32 logits [..., vocabulary]."""
        return self.model.lm_head(hidden).float()  # type: ignore[no-any-return]


def check_supported(model: Any) -> str:
    """Return the name of the module that gives a supported model's pre-RoPE query.

    Raises: UnsupportedConfigurationError: the model is not supported.
    """
    name = type(model).__name__
    if name not in QUERY_MODULES:
        raise UnsupportedConfigurationError(
            f"expected a model among {sorted(QUERY_MODULES)}, found {name}; routers cannot be "
            "trained for it yet: its query before RoPE and its masks are not known here"
        )
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    windowed = name == "MistralForCausalLM" and model.config.sliding_window is not None
    if kinds != {"full_attention"} or windowed:
        raise UnsupportedConfigurationError(
            f"expected {name} with full attention in every layer, found "
            f"{sorted(kinds)} with sliding_window={model.config.sliding_window}; set "
            "sliding_window to null in its config if the model was trained for full attention"
        )
    return QUERY_MODULES[name]


class _QueryHook:
    """Pools the query of a running probe, averaged over heads."""

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        owner = self.layer.owner
        if owner.step is None or owner.step.weights is None:
            return
        shape = (*output.shape[:2], owner.num_heads, owner.head_dim)
        mean_query = output.reshape(shape).mean(dim=2, dtype=torch.float32)
        owner.step.pooled.append(torch.bmm(owner.step.weights, mean_query))


def _routed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attend as the running step's policy decides; transformers' attention interface.

    Args:
        module: the attention module, with its `flux_layer`.
        query: [B, N, T, H] after RoPE.
        key: [B, K, T, H].
        value: [B, K, T, H].
        attention_mask: None; padding stands at the end.
        scaling: of the scores.

    Returns: [B, T, N, H], and no weights.
    """
    layer: _Layer = module.flux_layer  # type: ignore[assignment]
    owner = layer.owner
    step = owner.step
    if step is None:
        raise RuntimeError("expected RoutedModel.forward to call the model; do not call it itself")
    states = (query, key, value)
    if step.routes is None:
        return full_attention(*states, scaling).transpose(1, 2), None
    routes = step.routes[module.layer_idx]  # type: ignore[index]
    if torch.is_grad_enabled() and routes.requires_grad:
        full = full_attention(*states, scaling)
        sparse = owner.sparse_attention(*states, scaling)
        out = mix(full, sparse, _by_token(routes, step, query.shape[2]))
    else:
        out = _attend_as_needed(owner, step, states, scaling, routes > 0.5)
    return out.transpose(1, 2), None


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
            found = _sparse(owner, step, chosen, scaling, rows)
        else:
            found = full_attention(*chosen, scaling)
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
) -> torch.Tensor:
    """Attend some rows as SPARSE says: [rows, N, T, H]."""
    if step.sparse is not None:
        return step.sparse.select(rows.tolist())(*states, scaling)
    found = owner.sparse_attention(*states, scaling)
    if step.is_tail is None:
        return found
    tail = step.is_tail[rows][:, None, :, None]
    return torch.where(tail, full_attention(*states, scaling), found)
