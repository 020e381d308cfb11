"""The benchmarks, each with the figures it makes, the machine it needs and how long it takes."""

from dataclasses import dataclass
from pathlib import Path

SHAPE = Path(__file__).parent / "shapes" / "llama-3.1-8b"
"""A model's config.json without weights: `--load-format dummy` draws those."""
SAMPLE_MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"
_DUMMY = ("--model", str(SHAPE), "--load-format", "dummy")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One command of the suite."""

    module: str
    """Run as `python -m benchmarks.MODULE`."""
    makes: str
    """The figures."""
    machine: str
    """`cpu`, or `gpu` (Hopper: the baseline is FlashAttention-3)."""
    minutes: int
    """About; on 2 cores, or on one H200."""
    arguments: tuple[str, ...] | None = ()
    """Of `make bench`; None: it needs what only its caller has, and `make bench` leaves it out."""
    page: str = ""
    """Where its figures are shown, from `results/`."""

    def command(self, out: Path) -> list[str]:
        """Give the arguments of a run that writes its rows into a folder."""
        return ["-m", f"benchmarks.{self.module}", *(self.arguments or ()), "--out",
                str(out / f"{self.module}.json")]  # fmt: skip


SUITE = (
    Benchmark("bench_attention", "one layer's attention, each kernel", "gpu", 3,
              page="kernels_h200.md"),
    Benchmark("bench_plans", "decode calls under FlashAttention-3's plans and flux's", "gpu", 2,
              page="kernels_h200.md"),
    Benchmark("bench_xattention", "XAttention's scoring, choice and attention", "gpu", 3,
              page="xattention_h200.md"),
    Benchmark("bench_serve", "first token and time a token by share of SPARSE layers", "gpu", 20,
              _DUMMY, "serve_h200.md"),
    Benchmark("bench_online", "`vllm bench serve` by request rate", "gpu", 10, _DUMMY,
              "serve_h200.md"),
    Benchmark("bench_overhead", "what flux costs where it cannot help, GPU", "gpu", 10,
              (*_DUMMY, "--control"), "../../docs/LOG.md"),
    Benchmark("bench_overhead", "the same on a CPU", "cpu", 10,
              ("--model", str(SAMPLE_MODEL), "--baseline", "CPU_ATTN", "--eager", "--kv-gib",
               "0.25", "--sink-tokens", "64", "--window-tokens", "512", "--steps", "48", "--chunk",
               "4096", "--contexts", "256", "1024", "--repeats", "12", "--prefills", "1"),
              "overhead_cpu.md"),
    Benchmark("bench_never_slower", "decode, first tokens and mixed steps: is flux ever slower?",
              "gpu", 15,
              ("--model", str(SHAPE.parent / "qwen2.5-1.5b"), "--load-format", "dummy", "--kv-gib",
               "16", "--first-mixed", "--host", "1", "16"),
              "never_slower_h200.md"),
    Benchmark("bench_probe", "what a router's probe adds to the first token", "gpu", 10, _DUMMY,
              "../../docs/ROUTE_STATE.md"),
    Benchmark("probe_agreement", "a probe's routes beside those of the whole prompt", "cpu", 30,
              None, "probe_agreement.md"),
    Benchmark("bench_served_day", "short chats and long documents at once, by rate", "gpu", 15,
              _DUMMY),
    Benchmark("bench_kv_groups", "what KV cache groups cost, by their number", "gpu", 5,
              ("--model", str(SHAPE), "--engine-arguments",
               '{"load_format": "dummy", "gpu_memory_utilization": 0.25}'),
              "../../docs/KV_MEMORY.md"),
    Benchmark("bench_kv_answers", "a real model's answers with keys given back", "gpu", 5, None,
              "../../docs/KV_MEMORY.md"),
    Benchmark("bench_free_kv", "requests held and tokens a second as keys are given back", "gpu",
              10, None, "../../docs/KV_MEMORY.md"),
    Benchmark("serve_quality", "a router's quality on a server beside offline scoring", "gpu", 30,
              None),
    Benchmark("real_tasks", "LongBench, needles and more, agreement, routes by task", "gpu", 60,
              None, "real_tasks.md"),
    Benchmark("experiments.bench_head_split", "routes by layer against a split by heads", "gpu",
              10, _DUMMY, "serve_h200.md"),
    Benchmark("experiments.prompt_and_answer", "what SPARSE loses in the prompt and in the answer",
              "cpu", 20, None, "../../docs/PATTERNS.md"),
    Benchmark("experiments.router_seeds", "routers of several seeds, made and judged", "gpu", 30,
              None, "real_tasks.md"),
    Benchmark("experiments.xattention_density", "how much XAttention keeps of real text", "cpu",
              20, None, "../../docs/PATTERNS.md"),
)  # fmt: skip
