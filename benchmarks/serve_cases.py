"""What `bench_serve.py` measures, and the ideal that a measurement is held against.

Ideals: prefill of n tokens with a share f of SPARSE layers would take
T(n) - f * L * (a_full - a_window), decode T(n) - f * (T(n) - T(S + W)), where T is FLASH_ATTN's
time in the same run. L * a is what FlashAttention takes of a served prefill, summed by the profiler
over its calls: L * a_full with the baseline, L * a_window with all layers SPARSE. (Timed by itself,
attention runs at other clocks than between the matrix products: 3 % slower at 128K tokens.)
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    full_layers: tuple[int, ...] | None = None
    """Those of full attention, which can be SPARSE; None: all."""

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        """Read a model's folder."""
        return cls.of(json.loads((folder / "config.json").read_text()))

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """Read a model's config.json; of a model that sees more than text, the text's."""
        config = config.get("text_config", config)
        types = config.get("layer_types") or []
        full = tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
            full_layers=full or None,
        )

    @property
    def routed(self) -> tuple[int, ...]:
        """Layers that can be SPARSE; shares are of these."""
        return tuple(range(self.layers)) if self.full_layers is None else self.full_layers

    def shares(self, wanted: Sequence[float]) -> tuple[float, ...]:
        """Return the shares that whole layers can have, nearest to those wanted."""
        count = len(self.routed)
        return tuple(round(share * count) / count for share in wanted)

    def spread(self, share: float) -> list[int]:
        """Choose a share of the layers, evenly spread."""
        routed = self.routed
        count = round(share * len(routed))
        return sorted({routed[int((i + 0.5) * len(routed) / count)] for i in range(count)})


@dataclass(frozen=True, slots=True)
class Prefill:
    """Time to the first token of one prompt."""

    context: int
    """Tokens."""
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Of SPARSE layers."""
    repeats: int = 5


@dataclass(frozen=True, slots=True)
class Decode:
    """Time of a decode step, every row at this context."""

    context: int
    batch: int
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    repeats: int = 5
    mixed: bool = False
    """Share of the rows, SPARSE in all layers, beside rows that are FULL in all; not of layers."""


K = 1024
CHUNK = 8192
# One H200 of 139 GiB, both engines with 44 GiB of KV cache: 360,000 tokens of Llama-3.1-8B.
# Repeats are turns: what a time limit cuts off is the last turns of the longest prompt.
_PREFILL_8B: list[Prefill | Decode] = [Prefill(32 * K), Prefill(64 * K), Prefill(128 * K)]
_LONGEST_PREFILL_8B: list[Prefill | Decode] = [
    Prefill(256 * K, (0.5, 0.75, 0.8125, 1.0)),
    Prefill(256 * K, (0.25,)),
]
_DECODE_8B: list[Prefill | Decode] = [
    Decode(32 * K, 1),
    Decode(32 * K, 4),
    Decode(16 * K, 16),
    Decode(64 * K, 1),
    Decode(64 * K, 4),
    Decode(128 * K, 1),
    Decode(256 * K, 1),
]
PLANS: dict[str, list[Prefill | Decode]] = {
    "8b": [*_PREFILL_8B, *_DECODE_8B, *_LONGEST_PREFILL_8B],
    "8b_prefill": [*_PREFILL_8B, *_LONGEST_PREFILL_8B],
    "8b_extremes": [Prefill(128 * K, (1.0,)), Prefill(256 * K, (0.25,))],
    # Whole prompts at once: --chunk is the longest prompt's length.
    "one_chunk": [
        Prefill(32 * K, (0.5, 0.75, 1.0)),
        Prefill(64 * K, (0.5, 0.75, 1.0)),
        Prefill(128 * K, (0.5, 0.75, 1.0), 3),
    ],
    "one_chunk_64k": [Prefill(64 * K, (0.75, 1.0))],
    # What only one engine at a time has memory for.
    "8b_one_by_one": [
        Decode(256 * K, 3, (0.5, 0.75, 1.0)),
    ],
    "8b_batches_one_by_one": [
        Decode(32 * K, 16),
        Decode(128 * K, 4),
    ],
    # FULL and SPARSE rows in each layer's call, beside the same share by layers.
    "8b_mixed": [
        Decode(32 * K, 4, (0.5,)),
        Decode(32 * K, 4, (0.25, 0.5, 0.75), mixed=True),
        Decode(16 * K, 16, (0.5,)),
        Decode(16 * K, 16, (0.25, 0.5, 0.75), mixed=True),
        Decode(64 * K, 4, (0.5,)),
        Decode(64 * K, 4, (0.25, 0.5, 0.75), mixed=True),
    ],
    # Does it run at all; for any small model, also on a CPU.
    "smoke": [
        Prefill(512, (0.5, 1.0), 2),
        Decode(512, 2, (0.5,), 2),
        Decode(512, 2, (0.5,), 2, mixed=True),
    ],
    "smoke_one_by_one": [Decode(512, 2, (0.5,), 2)],
}


def longest_context(plan: str) -> int:
    """Return the tokens of a plan's longest prompt."""
    return max(case.context for case in PLANS[plan])


def default_chunk(plan: str) -> int:
    """Return the tokens of a step (`max_num_batched_tokens`) that a plan is meant for."""
    return longest_context(plan) if plan.startswith("one_chunk") else CHUNK


@dataclass(slots=True)
class Row:
    """One comparison; times are medians in the metric's unit."""

    metric: str
    """`ttft_s` or `tpot_ms`."""
    context: int
    batch: int
    sparse_share: float
    ideal: float | None
    flux_values: list[float]
    flash_attn_values: list[float]
    flux_memory: tuple[int, int] | None = None
    """Of a prefill: bytes of tensors on the GPU, (the most during it, after it)."""
    flash_attn_memory: tuple[int, int] | None = None
    """Likewise."""
    mixed: bool = False
    """The share is of rows, not of layers."""

    @property
    def flux(self) -> float:
        """Median with flux."""
        return statistics.median(self.flux_values)

    @property
    def flash_attn(self) -> float:
        """Median with the baseline."""
        return statistics.median(self.flash_attn_values)

    def __str__(self) -> str:
        ideal = f"{self.ideal / self.flux:.3f} of ideal" if self.ideal is not None else ""
        memory = ""
        if self.flux_memory and self.flash_attn_memory:
            taken = [
                (most - now) / 2**30 for most, now in (self.flux_memory, self.flash_attn_memory)
            ]
            memory = f", {taken[0]:.2f} and {taken[1]:.2f} GiB beside what stays"
        return (
            f"{self.metric} {self.context:7d} x {self.batch:2d} f={self.sparse_share:.2f}"
            f"{' of rows' if self.mixed else ''}: flux "
            f"{self.flux:.4f}, FLASH_ATTN {self.flash_attn:.4f}, "
            f"{self.flash_attn / self.flux:.3f}x {ideal} ({len(self.flux_values)} turns{memory})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the row for a JSON file."""
        derived = {
            "flux": self.flux,
            "flash_attn": self.flash_attn,
            "speedup": self.flash_attn / self.flux,
        }
        if self.ideal is not None:
            derived["share_of_ideal"] = self.ideal / self.flux
            derived["bound"] = self.flash_attn / self.ideal
        return asdict(self) | derived
