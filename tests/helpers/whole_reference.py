"""The reference of models whose layers are not all attention: the whole sequence at once.

A layer with a state (a convolution, a state space, linear attention) gives each token the same
output however its sequence was cut into steps, so one forward of transformers' own model over all
tokens says what a server computed in any of them, if every query's mask is that of its step. What a
prefix cache held is then of the same routes.

Dimension legend: N query heads, K key-value heads, H head dim, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from tests.helpers.engine import Answer
from tests.helpers.oracle import naive
from tests.helpers.oracle.masks import SparsePattern
from tests.helpers.reference_router import FULL

_ATTENTION_NAME = "flux_whole_reference"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: [1, N, n, H] to [1, n, N, H]; the mask is our own."""
    seen = module.whole_model.mask_of(module.layer_idx)
    if kwargs.get("sliding_window") is not None:  # of the model's own, counted in tokens
        token = torch.arange(query.shape[2])
        seen = seen & (token[:, None] - token < kwargs["sliding_window"])
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = query.float() @ keys.float().transpose(2, 3) * scaling
    scores = scores.masked_fill(~seen, float("-inf"))
    if kwargs.get("s_aux") is not None:  # learned sinks: scores without a value
        beside = kwargs["s_aux"].float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, beside], dim=-1)
    weights = scores.softmax(dim=-1)[..., : values.shape[2]]
    return (weights @ values.float()).transpose(1, 2).to(query.dtype), None


AttentionInterface.register(_ATTENTION_NAME, _attend)


class WholeModel:
    """A model of transformers in float32, its attention layers under masks of our own.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.set_attn_implementation(_ATTENTION_NAME)
        config = self.model.config
        self.num_layers = config.num_hidden_layers
        self.attention_layers: list[int] = []
        self._masks: dict[int, torch.Tensor] = {}
        self._queries: dict[int, torch.Tensor] = {}
        self._tokens = 0
        self._computed: dict[Any, torch.Tensor] = {}
        for module in self.model.modules():
            if not (hasattr(module, "q_proj") and hasattr(module, "layer_idx")):
                continue
            module.whole_model = self
            self.head_dim = module.head_dim
            self.attention_layers.append(module.layer_idx)
            source = getattr(module, "q_norm", None) or module.q_proj
            source.register_forward_hook(self._capture(module.layer_idx, module.head_dim))

    def _capture(self, layer: int, head_dim: int) -> Any:
        """Make the hook that keeps a layer's queries before RoPE, averaged over heads."""

        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            query = output[0].float()
            if query.shape[0] != self._tokens:  # Gemma norms them by head: [N, n, H]
                query = query.transpose(0, 1)
            self._queries[layer] = query.reshape(self._tokens, -1, head_dim).mean(dim=1)

        return hook

    def mask_of(self, layer: int) -> torch.Tensor:
        """Give the keys that each query of a layer sees: [n, n] bool."""
        return self._masks[layer]

    @torch.inference_mode()
    def probe(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Run tokens at any ascending positions, each attending to those before it.

        Returns: [layers, tokens, H] queries before RoPE, averaged over heads; zeros for layers
            without attention, or with heads of another size than the last one's.
        """
        self._tokens = len(tokens)
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        self._masks = dict.fromkeys(self.attention_layers, causal)
        self.model.base_model(
            input_ids=torch.tensor([list(tokens)]),
            position_ids=torch.tensor([list(positions)]),
            use_cache=False,
        )
        queries = torch.zeros(self.num_layers, len(tokens), self.head_dim)
        for layer, query in self._queries.items():
            if query.shape[1] == self.head_dim:
                queries[layer] = query
        return queries

    def logprobs(
        self, tokens: Sequence[int], prompt_len: int, pattern: SparsePattern, routes: Sequence[int]
    ) -> torch.Tensor:
        """Compute a request as a server would under fixed routes.

        Args:
            tokens: n of the prompt and the output.
            prompt_len: the prompt's; the others were decoded one by one.
            pattern: what SPARSE means.
            routes: per layer; those of layers without attention are not read.
        Returns: [n, V] log-probabilities of the token after each.
        """
        taken = tuple(routes[layer] for layer in self.attention_layers)
        key = tuple(tokens), prompt_len, pattern, taken
        if key not in self._computed:
            self._computed[key] = self._compute(tokens, prompt_len, pattern, routes)
        return self._computed[key]

    @torch.inference_mode()
    def _compute(
        self, tokens: Sequence[int], prompt_len: int, pattern: SparsePattern, routes: Sequence[int]
    ) -> torch.Tensor:
        self._masks, self._tokens = {}, len(tokens)
        for route in {routes[layer] for layer in self.attention_layers}:
            mask = _mask(prompt_len, len(tokens), route, pattern)
            self._masks |= {n: mask for n in self.attention_layers if routes[n] == route}
        logits = self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    def errors(self, answer: Answer, pattern: SparsePattern, routes: Sequence[int]) -> list[float]:
        """Compare an answer with what its routes make of it.

        Returns: errors of the prompt's log-probabilities, of the output's, and by how much each
            output token was less likely than the likeliest.
        """
        prompt_len = len(answer.prompt)
        table = self.logprobs(answer.prompt + answer.tokens, prompt_len, pattern, routes)
        errors = [
            abs(table[place - 1, token].item() - given)
            for place, (token, given) in enumerate(
                zip(answer.prompt, answer.prompt_logprobs, strict=False)
            )
            if given is not None
        ]
        for place, (token, given) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            row = table[prompt_len - 1 + place]
            errors += [abs(row[token].item() - given), (row.max() - row[token]).item()]
        return errors

    def full_routes(self) -> list[int]:
        """Give the routes under which every layer is as the model has it."""
        return [FULL] * self.num_layers


def _mask(prompt_len: int, length: int, route: int, pattern: SparsePattern) -> torch.Tensor:
    """Give the keys that each query sees under `streaming`: [length, length] bool."""
    sinks, window, block = pattern.sink_tokens, pattern.window_tokens, pattern.block_size
    rows = [naive.prefill_mask(range(prompt_len), route, sinks, window)]
    rows += [
        naive.decode_mask(range(place, place + 1), route, sinks, window, block)
        for place in range(prompt_len, length)
    ]
    return torch.cat([torch.nn.functional.pad(r, (0, length - r.shape[1])) for r in rows])
