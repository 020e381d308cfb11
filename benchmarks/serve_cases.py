"""What `bench_serve.py` measures, and the ideal that a measurement is held against.

Ideals: prefill of n tokens with a share f of SPARSE layers would take
T(n) - f * L * (a_full - a_window), decode T(n) - f * (T(n) - T(S + W)), where T is FLASH_ATTN's
time in the same run and a the time of one layer's attention over the prompt, in chunks as served.
"""

import statistics
import time
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


@dataclass(slots=True)
class Row:
    """One comparison; times are medians in the metric's unit."""

    metric: str
    """`ttft_s` or `tpot_ms`."""
    context: int
    batch: int
    sparse_share: float
    flux: float
    flash_attn: float
    ideal: float | None
    flux_values: list[float]
    flash_attn_values: list[float]

    @property
    def speedup(self) -> float:
        """How many times faster than FLASH_ATTN."""
        return self.flash_attn / self.flux

    @property
    def share_of_ideal(self) -> float | None:
        """Ideal time over measured time; 1 is ideal."""
        return None if self.ideal is None else self.ideal / self.flux

    def as_dict(self) -> dict[str, Any]:
        """Return the row for a JSON file."""
        derived = {"speedup": self.speedup, "share_of_ideal": self.share_of_ideal}
        return asdict(self) | derived


class Engine:
    """A `vllm.LLM` in a process of its own, driven step by step.

    Args:
        vocab_size: of the model; prompts are random tokens.
        arguments: of `vllm.LLM`.
    """

    def __init__(self, vocab_size: int, **arguments: Any) -> None:
        from vllm import LLM

        self._vocab_size = vocab_size
        self.llm = LLM(skip_tokenizer_init=True, enable_prefix_caching=False, **arguments)
        self._next = 0

    def fix_routes(self, layers: list[int]) -> None:
        """Make these layers SPARSE (flux engines with policy `static`)."""
        self.llm.collective_rpc("flux_fix_routes", args=(layers,))

    def prefill_seconds(self, tokens: int) -> float:
        """Time one request of random tokens to its first output token."""
        prompt = self._random_prompt(tokens)
        begin = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": prompt}], _sampling(1), use_tqdm=False)
        return time.perf_counter() - begin

    def _random_prompt(self, tokens: int) -> list[int]:
        self._next += 1
        generator = torch.Generator().manual_seed(self._next)
        return torch.randint(1, self._vocab_size, (tokens,), generator=generator).tolist()

    def start(self, context: int, batch: int) -> list[str]:
        """Bring `batch` requests of `context` tokens into decode and return their ids."""
        core = self.llm.llm_engine
        names = []
        for _ in range(batch):
            prompt = {"prompt_token_ids": self._random_prompt(context)}
            names.append(core.add_request(f"decode-{self._next}", prompt, _sampling(4096)))
        decoding: set[str] = set()
        while len(decoding) < batch:
            decoding |= {output.request_id for output in core.step()}
        for _ in range(16):
            core.step()
        return names

    def step_seconds(self, steps: int, batch: int) -> float:
        """Time decode steps; all requests must decode in each."""
        core = self.llm.llm_engine
        begin = time.perf_counter()
        for _ in range(steps):
            outputs = core.step()
            if len(outputs) != batch:
                raise RuntimeError(f"expected {batch} rows to decode, found {len(outputs)}")
        return (time.perf_counter() - begin) / steps

    def stop(self, names: list[str]) -> None:
        """End requests."""
        core = self.llm.llm_engine
        core.abort_request(names)
        while core.has_unfinished_requests():
            core.step()


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


def _sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
