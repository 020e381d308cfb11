"""Hang routers on a model of transformers: its own code runs, only attention is exchanged.

Two seams carry everything: transformers' attention interface, through which each layer calls
`_routed_attention` instead of its own, and a forward hook on the module that gives the query
before RoPE (`q_proj`, or `q_norm` where the model normalises queries).

Dimension legend: B prompts, C chunks, L layers, N query heads, T padded tokens, H head dim,
D hidden size.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.router.route import Route
from training.policies import Policy
from training.pooling import ChunkPlan, pool
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

    plan: ChunkPlan
    policy: Policy
    sparse: "PromptAttention | None"
    features: list[torch.Tensor] = field(default_factory=list)
    routes: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Routed:
    """What one forward pass gives."""

    hidden: torch.Tensor
    """[B, T, D] last hidden states."""
    features: torch.Tensor
    """[L, B, C, H] float32 pooled queries, detached."""
    routes: torch.Tensor
    """[L, B, C] float32, 1 for FULL, detached."""


@dataclass(slots=True)
class _Layer:
    """One layer's part; hangs on its attention module."""

    owner: "RoutedModel"
    mean_query: torch.Tensor | None = None


class RoutedModel:
    """A frozen language model whose layers ask a policy for their routes.

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

    def forward(
        self,
        token_ids: torch.Tensor,
        plan: ChunkPlan,
        policy: Policy,
        sparse: "PromptAttention | None" = None,
    ) -> Routed:
        """Run the model once.

        Args:
            token_ids: [B, T] int64, padded at the end, on the model's device.
            plan: of this batch, on the model's device.
            policy: chooses the routes.
            sparse: of this batch, what SPARSE means; None: sinks and window everywhere.

        Returns: Routed.
        Raises: UnsupportedConfigurationError: `sparse` given, and routes that pass gradients.
        """
        # Kept until the next call: recomputing activations in the backward pass reads it again.
        self.step = step = _Step(plan, policy, sparse)
        hidden = self.model.model(input_ids=token_ids, use_cache=False).last_hidden_state
        return Routed(hidden, torch.stack(step.features), torch.stack(step.routes))

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
    """Keeps the query of the running forward pass, averaged over heads."""

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        owner = self.layer.owner
        shape = (*output.shape[:2], owner.num_heads, owner.head_dim)
        query = output.detach().reshape(shape)
        self.layer.mean_query = query.mean(dim=2, dtype=torch.float32)


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
    step = layer.owner.step
    if step is None or layer.mean_query is None:
        raise RuntimeError("expected RoutedModel.forward to call the model; do not call it itself")
    index: int = module.layer_idx  # type: ignore[assignment]
    features = pool(layer.mean_query, step.plan)
    layer.mean_query = None
    decided = step.policy.decide(index, features)
    if len(step.features) == index:  # not so when activations are recomputed
        step.features.append(features)
        if isinstance(decided, Route):
            step.routes.append(features.new_full(features.shape[:2], float(decided)))
        else:
            step.routes.append(decided.detach())
    if isinstance(decided, Route):
        sparse = step.sparse or layer.owner.sparse_attention
        attend = full_attention if decided == Route.FULL else sparse
        return attend(query, key, value, scaling).transpose(1, 2), None
    z_BT = decided.gather(1, step.plan.chunk_of_token)
    if torch.is_grad_enabled() and decided.requires_grad:
        if step.sparse is not None:
            raise UnsupportedConfigurationError(
                "expected routers to be trained under 'streaming' or 'triangle', which the plan "
                "tells, found another attention for SPARSE layers in training; train without "
                "`sparse` and evaluate the router under other patterns (--patterns)"
            )
        full = full_attention(query, key, value, scaling)
        sparse_out = layer.owner.sparse_attention(query, key, value, scaling)
        out = mix(full, sparse_out, z_BT.masked_fill(step.plan.is_tail, Route.FULL))
    else:
        out = _attend_as_needed(layer.owner, step, (query, key, value), scaling, z_BT)
    return out.transpose(1, 2), None


def _attend_as_needed(
    owner: RoutedModel,
    step: _Step,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scaling: float,
    z_BT: torch.Tensor,
) -> torch.Tensor:
    """Compute for each prompt only the kinds of attention its chunks chose: [B, N, T, H]."""
    is_full = z_BT > 0.5
    some = torch.stack([is_full.any(dim=1), (~is_full).any(dim=1)]).tolist()
    out = torch.empty_like(states[0])
    sparse = step.sparse or owner.sparse_attention
    for chosen, attend, wanted in (
        (is_full, full_attention, some[0]),
        (~is_full, sparse, some[1]),
    ):
        if all(wanted):
            out = torch.where(chosen[:, None, :, None], attend(*states, scaling), out)
            continue
        rows = [row for row, want in enumerate(wanted) if want]
        if not rows:
            continue
        if attend is step.sparse:
            attend = step.sparse.select(rows)
        index = torch.tensor(rows, device=out.device)
        query, key, value = (state[index] for state in states)
        result = attend(query, key, value, scaling)
        kept = torch.where(chosen[index][:, None, :, None], result, out[index])
        out = out.index_copy(0, index, kept)
    return out
