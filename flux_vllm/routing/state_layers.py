"""A hybrid's layers beside attention, in a probe: convolutions, state spaces, linear attention.

Such a layer carries a state from token to token, in blocks of vLLM's KV cache. In a probe it begins
without a state, runs over the probe's tokens as over one sequence, and leaves its state in memory
of the probe's own: no request's state is read or written.

vLLM 0.32 and 0.33. `tests/unit/hooks/test_sources.py` fails when vLLM's side of it changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

_BLOCK = 1
"""Of the probe's own memory; block 0 is vLLM's null block, which its kernels pass over."""


class StateLayers:
    """The layers with a state of a model that is loaded.

    Args:
        vllm_config: the engine's.
        tokens: of every probe.
        device: of the model.
    """

    def __init__(self, vllm_config: Any, tokens: int, device: torch.device) -> None:
        from vllm.model_executor.layers.mamba.abstract import MambaBase

        context = vllm_config.compilation_config.static_forward_context
        layers = {name: layer for name, layer in context.items() if isinstance(layer, MambaBase)}
        self.metadata: dict[str, Any] = {}
        """By layer name: vLLM's own metadata of a batch that is one prompt of so many tokens."""
        self._layers: list[Any] = list(layers.values())
        self._states: list[tuple[torch.Tensor, ...]] = []
        # Layers run one after another, and none reads what another one left.
        memory: dict[Any, tuple[torch.Tensor, ...]] = {}
        for name, layer in layers.items():
            spec = _without_checkpoints(layer.get_kv_cache_spec(vllm_config))
            self.metadata[name] = _metadata(name, layer, spec, vllm_config, tokens, device)
            shapes = tuple(zip(map(tuple, spec.shapes), spec.dtypes, strict=True))
            if shapes not in memory:
                memory[shapes] = tuple(
                    torch.zeros(_BLOCK + 1, *shape, dtype=dtype, device=device)
                    for shape, dtype in shapes
                )
            self._states.append(memory[shapes])

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let the layers keep their states in the probe's own memory meanwhile."""
        former = [layer.kv_cache for layer in self._layers]
        for layer, state in zip(self._layers, self._states, strict=True):
            layer.kv_cache = state
        try:
            yield
        finally:
            for layer, state in zip(self._layers, former, strict=True):
                layer.kv_cache = state


def _without_checkpoints(spec: Any) -> Any:
    """Ask for no state from within the prompt, which vLLM keeps for its prefix cache."""
    return replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)


def _metadata(
    name: str, layer: Any, spec: Any, vllm_config: Any, tokens: int, device: torch.device
) -> Any:
    from vllm.config import set_current_vllm_config

    builder_class = layer.get_attn_backend().get_builder_cls()
    with set_current_vllm_config(vllm_config):
        builder = builder_class(spec, [name], vllm_config, device)
        return builder.build(0, _one_prompt(spec, tokens, device))


def _one_prompt(spec: Any, tokens: int, device: torch.device) -> Any:
    """Describe a batch of one prompt, complete, in the one block of the probe's memory."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    columns = 1 + spec.num_speculative_blocks
    if spec.mamba_cache_mode != "none":  # a column a block of the prompt
        columns += -(-tokens // spec.block_size)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=ends.to(device),
        query_start_loc_cpu=ends,
        seq_lens=ends[1:].to(device),
        seq_lens_cpu_upper_bound=ends[1:],
        num_reqs=1,
        num_actual_tokens=tokens,
        max_query_len=tokens,
        max_seq_len=tokens,
        block_table_tensor=torch.full((1, columns), _BLOCK, dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
        is_prefilling=torch.tensor([True]),
    )
