"""One step of a simulated server in transformers and float32: history in, longer history out.

The model code is transformers' own; only its attention function is replaced, and the queries are
read before RoPE by hooks, so that a layer is routed before it attends, as on the server.

Dimension legend: N query heads, K key-value heads, H head dim, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM

from tests.helpers.reference_attention import Phase, SparsePattern, masked_attention

_ATTENTION_NAME = "flux_reference"


@dataclass(slots=True)
class History:
    """What a server's KV cache holds of one token sequence.

    Attributes:
        tokens: n token ids.
        keys: per layer [K, n, H], after RoPE.
        values: per layer [K, n, H].
    """

    tokens: list[int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> "History":
        """Give the history of the first `count` tokens: what a prefix-cache hit of them reads."""
        if not 0 <= count <= len(self):
            raise ValueError(f"count: expected 0 to {len(self)}, got {count}")
        return History(
            self.tokens[:count],
            [k[:, :count] for k in self.keys],
            [v[:, :count] for v in self.values],
        )


@dataclass(slots=True)
class StepRecord:
    """One step as it was computed.

    Attributes:
        start: first position computed.
        length: tokens computed.
        phase: whether the sparse pattern was exact or widened to blocks.
        routes: per layer FULL or SPARSE.
        margins: [length] of XAttention: the least margin of a position's block choices, over
            layers and heads; infinite where nothing was chosen.
    """

    start: int
    length: int
    phase: Phase
    routes: list[int]
    margins: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.margins = torch.full((self.length,), float("inf"))


@dataclass(slots=True)
class _Step:
    """One step while it runs; the attention layers fill its history and record."""

    record: StepRecord
    history: History
    pattern: SparsePattern
    prompt_len: int


class _Probe:
    """Tokens that only attend to those before them; nothing is kept."""


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: [1, N, q, H] to [1, q, N, H]; the mask is our own."""
    unknown = [n for n in ("sliding_window", "softcap", "s_aux") if kwargs.get(n) is not None]
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"the reference has no attention with {unknown or 'a mask'}")
    step, layer = module.reference_model.current_step, module.layer_idx
    if isinstance(step, _Probe):
        attended = scaled_dot_product_attention(
            *(t.float() for t in (query, key, value)),
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
        return attended.transpose(1, 2).to(query.dtype), None
    history, keep = step.history, module.reference_model.keep
    history.keys[layer] = torch.cat([history.keys[layer], keep(key[0], layer, "k")], dim=1)
    history.values[layer] = torch.cat([history.values[layer], keep(value[0], layer, "v")], dim=1)
    output = masked_attention(
        query[0].float(),
        history.keys[layer],
        history.values[layer],
        scaling,
        step.record.routes[layer],
        step.record.phase,
        step.pattern,
        prompt_len=step.prompt_len,
        margins=step.record.margins,
    )
    return output[None].to(query.dtype), None


AttentionInterface.register(_ATTENTION_NAME, _attend)


class StepModel:
    """A causal LM of transformers whose attention follows routes.

    Works for models whose attention has `q_proj` and, where it normalises queries, a `q_norm`
    that keeps heads in the last dimension but one (Llama, Qwen2, Qwen3, Mistral, ...).

    Args:
        model_folder: a Hugging Face model.
        dtype: of weights and activations. Below float32 it tells what error any server of that
            dtype makes: attention alone is still computed in float32, and rounded afterwards.
        keep: what a KV cache makes of keys or values of a layer ("k" or "v"); as they are.
    """

    def __init__(
        self,
        model_folder: str | Path,
        dtype: torch.dtype = torch.float32,
        keep: Callable[[torch.Tensor, int, str], torch.Tensor] = lambda given, *_: given,
    ) -> None:
        self.keep = keep
        self.model = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=dtype, attn_implementation=_ATTENTION_NAME
        ).eval()
        config = self.model.config
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", config.hidden_size // self.num_heads)
        self.vocab_size = config.vocab_size
        self.current_step: _Step | _Probe | None = None
        self._queries: list[torch.Tensor] = []
        for layer, block in enumerate(self.model.base_model.layers):
            attention = block.self_attn
            attention.reference_model = self  # the attention function's way to the running step
            source = getattr(attention, "q_norm", None) or attention.q_proj
            source.register_forward_hook(self._capture(layer))

    def _capture(self, layer: int) -> Any:
        """Make the hook that keeps a layer's queries before RoPE, averaged over heads."""

        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            if layer == 0:
                self._queries = []
            query = output.reshape(output.shape[1], self.num_heads, self.head_dim)
            self._queries.append(query.float().mean(dim=1))

        return hook

    @torch.inference_mode()
    def probe(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Run tokens at any ascending positions, each attending to those before it.

        Returns: [layers, tokens, H] queries before RoPE, averaged over heads.
        """
        self.current_step = _Probe()
        self.model.base_model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=torch.tensor([list(positions)]),
            use_cache=False,
        )
        self.current_step = None
        return torch.stack(self._queries)

    def empty_history(self) -> History:
        """Give the history of no tokens."""

        def empty(*shape: int) -> list[torch.Tensor]:
            return [torch.empty(shape) for _ in range(self.num_layers)]

        kv_shape = (self.num_kv_heads, 0, self.head_dim)
        return History([], empty(*kv_shape), empty(*kv_shape))

    @torch.inference_mode()
    def step(
        self,
        history: History,
        tokens: Sequence[int],
        *,
        phase: Phase,
        pattern: SparsePattern,
        prompt_len: int,
        routes: Sequence[int],
    ) -> tuple[torch.Tensor, History, StepRecord]:
        """Compute the next tokens of a sequence; `history` itself stays as it is.

        Args:
            history: the c tokens computed before.
            tokens: the ids at positions [c, c + q).
            phase: "prefill" (exact) or "decode" (sinks and window widened to whole blocks).
            pattern: what SPARSE means.
            prompt_len: prompt tokens of the request that computes this.
            routes: per layer.
        Returns: hidden states [q, hidden], the longer history, what was done.
        """
        start, length = len(history), len(tokens)
        record = StepRecord(start, length, phase, list(routes))
        grown = History(history.tokens + list(tokens), list(history.keys), list(history.values))
        self.current_step = _Step(record, grown, pattern, prompt_len)
        output = self.model.base_model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=torch.arange(start, start + length)[None],
            use_cache=False,
        )
        self.current_step = None
        return output.last_hidden_state[0], grown, record

    @torch.inference_mode()
    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn hidden states [q, hidden] into log-probabilities of the next token [q, V]."""
        head, config = self.model.get_output_embeddings(), self.model.config
        # Cohere's factor and Granite's divisor.
        scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        return torch.log_softmax(head(hidden).float() * scale, dim=-1)
