"""What `bench_serve.py` measures, and the ideal that a measurement is held against.

Ideals: prefill of n tokens with a share f of SPARSE layers would take
T(n) - f * L * (a_full - a_window), decode T(n) - f * (T(n) - T(S + W)), where T is FLASH_ATTN's
time in the same run and a the time of one layer's attention over the prompt, in chunks as served.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """Read a model's config.json."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
        )

    def spread(self, share: float) -> list[int]:
        """Choose a share of the layers, evenly spread."""
        count = round(share * self.layers)
        return sorted({int((i + 0.5) * self.layers / count) for i in range(count)})


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


K = 1024
PLANS: dict[str, list[Prefill | Decode]] = {
    # One H200 of 139 GiB, both engines with 44 GiB of KV cache: 360,000 tokens of Llama-3.1-8B.
    # Repeats are turns: what a time limit cuts off is the last turns of the longest prompt.
    "8b": [
        Prefill(32 * K),
        Prefill(64 * K),
        Prefill(128 * K),
        Decode(32 * K, 1),
        Decode(32 * K, 4),
        Decode(16 * K, 16),
        Decode(64 * K, 1),
        Decode(64 * K, 4),
        Decode(128 * K, 1),
        Decode(256 * K, 1),
        Prefill(256 * K, (0.25, 0.5, 0.75, 0.8, 1.0)),
    ],
    # Two rows and more of 256K, which only one engine at a time has memory for.
    "8b_one_by_one": [Decode(256 * K, 3, (0.75,))],
    # Does it run at all; for any small model, also on a CPU.
    "smoke": [Prefill(512, (0.5, 1.0), 2), Decode(512, 2, (0.5,), 2)],
}


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
        return (
            f"{self.metric} {self.context:7d} x {self.batch:2d} f={self.sparse_share:.2f}: flux "
            f"{self.flux:.4f}, FLASH_ATTN {self.flash_attn:.4f}, "
            f"{self.flash_attn / self.flux:.3f}x {ideal} ({len(self.flux_values)} turns)"
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


def attention_seconds(
    shape: Shape, context: int, chunk: int, window_tokens: int | None, repeats: int = 5
) -> float:
    """Time one layer's FlashAttention-3 over a prompt, chunk by chunk.

    Args:
        shape: of the model.
        context: tokens of the prompt.
        chunk: tokens a step.
        window_tokens: of the window alone; None for full attention.
        repeats: the median of so many counts.
    """
    from flux_vllm.attention_backend.kernels import fa3

    if not fa3.is_available():
        raise RuntimeError("expected FlashAttention-3 for the ideal, found none on this GPU")
    block = 16
    blocks = -(-context // block)
    pages = torch.randn(
        blocks, block, shape.kv_heads, 2 * shape.head_dim, dtype=torch.bfloat16, device="cuda"
    )
    keys, values = pages.split(shape.head_dim, dim=-1)
    table = torch.arange(blocks, dtype=torch.int32, device="cuda")[None]
    row = torch.zeros(1, dtype=torch.int32, device="cuda")

    def run() -> None:
        for start in range(0, context, chunk):
            tokens = min(chunk, context - start)
            query = torch.empty(
                tokens, shape.heads, shape.head_dim, dtype=torch.bfloat16, device="cuda"
            ).normal_()
            ends = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
            used = torch.tensor([start + tokens], dtype=torch.int32, device="cuda")
            timer.measure(
                lambda q=query, e=ends, u=used, n=tokens, s=start: fa3.attend(
                    q, keys, values, torch.empty_like(q), table, row, e, u,
                    max_query_len=n, max_seq_len=s + n, scale=shape.head_dim**-0.5,
                    window_tokens=window_tokens,
                )
            )  # fmt: skip

    totals = []
    for _ in range(repeats + 1):
        timer = _CudaTimer()
        run()
        totals.append(timer.seconds())
    return statistics.median(totals[1:])


class _CudaTimer:
    """Sums the device time of calls."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def measure(self, call: Callable[[], Any]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        self._events.append((begin, end))

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
