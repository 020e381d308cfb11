"""The Layer Router and what it looks at, written again from DESIGN.md for the tests.

Nothing here comes from `flux_vllm`: the network is spelled out over the checkpoint's raw tensors,
and the queries are those that transformers' own layers make of the prompt's ends, without padding.
Slow and plain on purpose.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch.nn.functional import linear, silu

# A route is the number of its column in the router's logits.
SPARSE, FULL = 0, 1


class ProbedModel(Protocol):
    """What a router asks of a model: `StepModel` and others."""

    def probe(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Return each layer's mean query before RoPE: [layers, tokens, H]."""


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
    def reach(self) -> int:
        """Tokens of context up to which no route matters."""
        return int(self.metadata["sink_tokens"]) + int(self.metadata["window_tokens"])

    @property
    def pools(self) -> list[tuple[str, int]]:
        """Kind and tokens of each pool."""
        named = json.loads(self.metadata.get("pools", "[]"))
        if not named:
            kind = "tail" if self.metadata.get("pool_prefix") == "false" else "ends"
            named = [f"{kind}:{self.metadata['pool_tokens']}"]
        parts = [(*pool.split(":"), "0")[:2] for pool in named]
        return [(kind, int(tokens)) for kind, tokens in parts]

    @property
    def probe(self) -> tuple[int, int]:
        """Tokens of a prompt's head and of its tail that are run."""
        head, tail = json.loads(self.metadata.get("probe", "[128, 128]"))
        if "pools" not in self.metadata:
            pooled = int(self.metadata["pool_tokens"])
            head, tail = max(head, pooled), max(tail, pooled)
        return head, tail

    def positions(self, prompt_len: int) -> list[int]:
        """List the positions that are run: all of a short prompt, else its head and tail."""
        head, tail = self.probe
        if prompt_len <= head + tail:
            return list(range(prompt_len))
        return [*range(head), *range(prompt_len - tail, prompt_len)]

    def pooled(self, model: ProbedModel, prompt: Sequence[int]) -> torch.Tensor:
        """Pool each layer's mean query before RoPE: [layers, pools, H]."""
        positions = self.positions(len(prompt))
        queries = model.probe([prompt[position] for position in positions], positions)
        count = len(positions)
        picked = {
            "head": lambda n: list(range(min(n, count))),
            "tail": lambda n: list(range(max(0, count - n), count)),
        }
        picked["ends"] = lambda n: picked["head"](n) + picked["tail"](n)
        pools = []
        for kind, tokens in self.pools:
            if kind in picked:
                pools.append(queries[:, picked[kind](tokens)].mean(dim=1))
                continue
            told = overlap_by_sets(prompt, tokens) if kind == "overlap" else [_length(prompt)]
            numbers = [told[place % len(told)] for place in range(queries.shape[-1])]
            pools.append(torch.tensor(numbers).expand(len(queries), -1))
        return torch.stack(pools, dim=1)

    def features(self, model: ProbedModel, prompt: Sequence[int]) -> torch.Tensor:
        """Put each layer's pools and the context layers' in a row: [layers, F]."""
        pooled = self.pooled(model, prompt)
        context = [pooled[i] for i in json.loads(self.metadata.get("context_layers", "[]"))]
        return torch.stack([torch.cat([own, *context]).flatten() for own in pooled])

    def p_full(self, model: ProbedModel, prompt: Sequence[int]) -> torch.Tensor:
        """Give the probability of FULL in each layer: [layers]."""
        features = self.features(model, prompt)
        logits = [self.logits(layer, row) for layer, row in enumerate(features)]
        return torch.softmax(torch.stack(logits), dim=-1)[:, FULL]

    def logits(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        """Apply one layer's network. features: [..., F]. Returns: [..., 2]."""

        def dense(name: str, x: torch.Tensor) -> torch.Tensor:
            prefix = f"layers.{layer}.{name}"
            return linear(x, self.tensors[f"{prefix}.weight"], self.tensors[f"{prefix}.bias"])

        hidden = dense("features.2", silu(dense("features.0", features.float())))
        hidden = silu(dense("head.2", silu(dense("head.0", hidden))))
        return dense("head.4", hidden)


def _length(prompt: Sequence[int]) -> float:
    """Tell a prompt's length: doublings of 16,384 tokens."""
    return math.log2(len(prompt) / 16384)


def overlap_by_sets(ids: Sequence[int], near_tokens: int) -> list[float]:
    """Tell where a prompt's end occurs earlier, as `overlap:NEAR_TOKENS` means it.

    Returns: for one token and for three in a row, for the latest 128 tokens and for 32: the share
        of these different ones that occurs far from the end, and of those that only do so.
    """
    split = max(0, len(ids) - near_tokens)

    def grams(part: Sequence[int], gram: int) -> set[tuple[int, ...]]:
        return {tuple(part[at : at + gram]) for at in range(len(part) - gram + 1)}

    found = []
    for gram in (1, 3):
        for end in (128, 32):
            start = max(split, len(ids) - end)
            asked = grams(ids[start:], gram)
            far, near = grams(ids[:split], gram), grams(ids[split:start], gram)
            count = max(1, len(asked))
            found += [len(asked & far) / count, len((asked & far) - near) / count]
    return found
