"""The Layer Router and its pooled features, written again from DESIGN.md for the tests.

Nothing here comes from `flux_vllm`: the network is spelled out over the checkpoint's raw tensors,
and pooling picks single tokens where the server adds up stored sums. Slow and plain on purpose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.functional import linear, silu

# A route is the number of its column in the router's logits.
SPARSE, FULL = 0, 1

GRANULE_TOKENS = 16
"""Tokens computed in earlier steps are known to the server as sums over this many positions."""


@dataclass(frozen=True)
class ReferenceRouter:
    """A router checkpoint as raw float32 tensors.

    Attributes:
        tensors: by checkpoint name, e.g. `layers.3.features.0.weight` [8 * head_dim, head_dim].
        metadata: the checkpoint's metadata, all strings.
    """

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]

    @classmethod
    def load(cls, path: str | Path) -> "ReferenceRouter":
        """Read `flux_router.safetensors`, given by the file or by its folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "flux_router.safetensors"
        with safe_open(str(path), framework="pt") as checkpoint:
            names = checkpoint.keys()
            tensors = {name: checkpoint.get_tensor(name).float() for name in names}
            return cls(tensors, checkpoint.metadata() or {})

    @property
    def pool_tokens(self) -> int:
        """Tokens pooled at an end of the prompt."""
        return int(self.metadata["pool_tokens"])

    @property
    def pool_prefix(self) -> bool:
        """Whether the prompt's first tokens are pooled, beside its latest."""
        return self.metadata.get("pool_prefix") != "false"

    def logits(self, layer: int, pooled: torch.Tensor) -> torch.Tensor:
        """Apply one layer's network. pooled: [..., head_dim]. Returns: [..., 2]."""

        def dense(name: str, x: torch.Tensor) -> torch.Tensor:
            prefix = f"layers.{layer}.{name}"
            return linear(x, self.tensors[f"{prefix}.weight"], self.tensors[f"{prefix}.bias"])

        features = dense("features.2", silu(dense("features.0", pooled.float())))
        hidden = silu(dense("head.2", silu(dense("head.0", features))))
        return dense("head.4", hidden)

    def p_full(self, layer: int, pooled: torch.Tensor) -> float:
        """Give the probability of FULL for one pooled vector [head_dim]."""
        return float(torch.softmax(self.logits(layer, pooled), dim=-1)[FULL])


def pooled_positions(
    start: int,
    end: int,
    prompt_len: int,
    pool_tokens: int,
    has_sum: torch.Tensor,
    pool_prefix: bool = True,
) -> list[int]:
    """List the positions whose queries a prefill chunk pools, a position per time it counts.

    Args:
        start: first position this step computes.
        end: one past the last position this step computes.
        prompt_len: the request's prompt, tokens.
        pool_tokens: tokens pooled at an end of what is known of the prompt.
        has_sum: [start or more] bool; whether an earlier position was computed as a prompt token
            of the request that computed it.
        pool_prefix: whether the first tokens are pooled, beside the latest.
    Returns: list[int]: positions below `end`, possibly with repeats.
    """
    known_end = min(end, prompt_len)
    ranges = [range(max(0, known_end - pool_tokens), known_end)]
    if pool_prefix:
        ranges.append(range(0, min(pool_tokens, known_end)))
    positions: list[int] = []
    for wanted in ranges:
        earlier_stop = min(wanted.stop, start)
        if wanted.start < earlier_stop:
            # Edges round outward to granules, though never past what was computed before.
            low = wanted.start // GRANULE_TOKENS * GRANULE_TOKENS
            high = -(-earlier_stop // GRANULE_TOKENS) * GRANULE_TOKENS
            positions += [p for p in range(low, min(high, start)) if has_sum[p]]
        positions += range(max(wanted.start, start), wanted.stop)
    return positions
