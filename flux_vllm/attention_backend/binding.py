"""What an attention layer needs to take part in routing, bound to it once the model is loaded."""

from dataclasses import dataclass

import torch

from flux_vllm.attention_backend.rotary import RotaryInverse
from flux_vllm.runtime import FluxRuntime


@dataclass(slots=True)
class LayerBinding:
    """The routing side of one attention layer."""

    runtime: FluxRuntime
    layer: int
    """Index of the model's layer."""
    rotary: RotaryInverse

    def mean_query(
        self, query: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Average queries over this rank's heads, as they were before RoPE.

        Args:
            query: [tokens of the batch, N, H] after RoPE.
            tokens: [T] int64: which of them.
            positions: [T] int64: their positions.

        Returns: [T, H] float32.
        """
        return self.rotary(query[tokens].float().mean(dim=1), positions)
