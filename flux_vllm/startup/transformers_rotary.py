"""The rotary embedding of a model that vLLM runs by transformers' own code."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROTATION = "apply_rotary_pos_emb"
"""The function that rotates queries and keys, in the source files of transformers' models."""


@dataclass(frozen=True, slots=True)
class TransformersRotary:
    """A rotary embedding of transformers with the interface of vLLM's; equal where it is the same.

    transformers keeps cos and sin, and how they are applied, apart: the former come from one module
    for all layers, the latter is a function beside the attention module.
    """

    embed: nn.Module
    """cos and sin of positions."""
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """Of queries, keys, cos and sin."""
    head_dim: int
    layer_type: str | None
    """Which of several tables of cos and sin the layer uses."""

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return 2 * self._pairs()

    @property
    def is_neox_style(self) -> bool:
        """Whether a dimension is paired with one half of them away, not with its neighbour."""
        return self._partner() > 1

    def forward_native(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate.

        Args:
            positions: [T] int64.
            query: [T, H].
            key: [T, H].

        Returns: both, rotated.
        """
        cos, sin = self._cos_sin(positions)
        query, key = self.apply(query[None, None], key[None, None], cos[None], sin[None])
        return query[0, 0], key[0, 0]

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        """Give cos and sin of all positions side by side: [positions, rotary_dim] float32."""
        return self.cos_sin_table(self.embed.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]

    def cos_sin_table(self, count: int) -> torch.Tensor:
        """Give cos and sin of the first positions, as many as one likes: [count, rotary_dim]."""
        pairs = self._pairs()
        cos, sin = self._cos_sin(torch.arange(count, device=self._device))
        return torch.cat([cos[:, :pairs], sin[:, :pairs]], dim=-1)

    @property
    def _device(self) -> torch.device:
        return next(self.embed.buffers()).device

    @torch.no_grad()
    def _cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give cos and sin of positions [T], each [T, C] float32."""
        like = torch.zeros((), dtype=torch.float32, device=self._device)
        kind = {} if self.layer_type is None else {"layer_type": self.layer_type}
        cos, sin = self.embed(like, positions[None], **kind)
        return cos[0], sin[0]

    def _partner(self) -> int:
        """Give the dimension that the first one is rotated with."""
        query = torch.zeros(1, self.head_dim, device=self._device)
        query[0, 0] = 1.0
        rotated, _ = self.forward_native(
            torch.ones(1, dtype=torch.int64, device=self._device), query, query
        )
        return int(rotated[0, 1:].abs().argmax()) + 1

    def _pairs(self) -> int:
        """Count the pairs of dimensions that are rotated."""
        partner = self._partner()
        if partner > 1:
            return partner
        cos, _ = self._cos_sin(torch.zeros(1, dtype=torch.int64, device=self._device))
        return cos.shape[-1] // 2


def transformers_rotary(
    model: nn.Module, attention: Any, head_dim: int
) -> TransformersRotary | None:
    """Find what rotates the queries of one of transformers' attention modules.

    Args:
        model: vLLM's, which holds transformers' own.
        attention: the attention module.
        head_dim: of its queries.

    Returns: None where it has another form, or frequencies that change with the batch (LongRoPE,
        dynamic scaling).
    """
    apply = vars(sys.modules[type(attention).__module__]).get(ROTATION)
    embeds = [
        found
        for part in model.modules()
        if isinstance(found := getattr(part, "rotary_emb", None), nn.Module)
        and any(inner is attention for inner in part.modules())
    ]
    if apply is None or len(embeds) != 1:
        return None
    (embed,) = embeds
    kind = None
    if "layer_type" in inspect.signature(embed.forward).parameters:
        kind = attention.config.layer_types[attention.layer_idx]
    rope_type: Any = getattr(embed, "rope_type", None)
    if (rope_type if kind is None else rope_type[kind]) in ("longrope", "dynamic"):
        return None
    return TransformersRotary(embed, apply, head_dim, kind)
