"""What flux costs where it cannot help: vLLM's own backend, policy `full`, and a router in turns.

    python -m benchmarks.bench_overhead --model FOLDER --out OUT.json [--load-format dummy]

All engines are alive at once, each in processes of its own, and take turns. Policy `router` runs at
threshold 0: all layers attend FULL, and probes, views and bookkeeping remain. A row says how
much longer flux took than vLLM's backend in the same turn: the median over turns, with a bootstrap
95 % interval. Two engines of the same backend differ too: with --control a second one runs, and
rows also say how much longer than that, and than the mean of the two.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_process import Engine
from benchmarks.row_file import RowFile, say
from benchmarks.serve_cases import Shape
from benchmarks.turns import longer_percent
from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.router.model import LayerRouter

_TIMED_PREFILLS = 20
_PROFILED_STEPS = 16
_PRINTED_KERNELS = 24


def main() -> None:
    """Measure, print the rows and write them with the raw figures."""
    args = _parse()
    shape = Shape.read(args.model)
    with tempfile.TemporaryDirectory() as folder:
        router = write_random_router(shape, Path(folder), args.sink_tokens, args.window_tokens)
        engines = {
            args.baseline: _engine(args, shape, None),
            "full": _engine(args, shape, {"policy": "full"}),
            "router": _engine(args, shape, {"router": str(router), "threshold": 0.0}),
        }
        if args.control:
            engines[_control(args.baseline)] = _engine(args, shape, None)
        with ExitStack() as stack:
            for engine in engines.values():
                stack.enter_context(engine)
            for engine in engines.values():
                engine.wait()
            say("all engines are loaded")
            while args.go is not None and not args.go.exists():
                time.sleep(0.2)
            rows = RowFile(args.out)
            settings = {name: engine.settings() for name, engine in engines.items()}
            for context in args.contexts:
                for row in _measure(engines, args, context):
                    key = row["metric"], context, row["policy"]
                    rows.keep(key, row | {"engine": settings[row["policy"]]}, describe(row))
            if args.profile:
                _profile(engines, args)


def _profile(engines: dict[str, Engine], args: argparse.Namespace) -> None:
    for context in args.contexts:
        for name, engine in engines.items():
            engine.prefill_seconds(context, 3)
            engine.call_worker("begin_host_times")
            engine.prefill_seconds(context, _TIMED_PREFILLS)
            times = engine.call_worker("end_host_times")
            print(f"{name}, {context} tokens: host time of a prefill, each with what it calls")
            for function, (calls, seconds) in times.items():
                calls, micros = calls / _TIMED_PREFILLS, 1e6 * seconds / _TIMED_PREFILLS
                print(f"  {micros:9.0f} us {calls:5.0f} x  {function}")
            _print_kernels(f"{name}, {context} tokens", 1, engine.profile(context))
            running = engine.start(context, 1)
            steps = engine.profile_steps(_PROFILED_STEPS, 1)
            engine.stop(running)
            _print_kernels(f"{name}, decode at {context} tokens, a step", _PROFILED_STEPS, steps)


def _print_kernels(what: str, times: int, kernels: list[tuple[str, int, float]]) -> None:
    print(f"{what}: {sum(ms for _, _, ms in kernels) / times:.3f} ms of kernels")
    for kernel, calls, ms in kernels[:_PRINTED_KERNELS]:
        print(f"  {ms / times:9.3f} ms {calls / times:7.1f} x  {kernel[:100]}")


def write_random_router(
    shape: Shape, folder: Path, sink_tokens: int, window_tokens: int, pool_tokens: int = 96
) -> Path:
    """Write a router of random weights that fits a model, and return its path."""
    info = RouterInfo(
        base_model="",
        num_layers=shape.layers,
        head_dim=shape.head_dim,
        pool_tokens=pool_tokens,
        sink_tokens=sink_tokens,
        window_tokens=window_tokens,
    )
    torch.manual_seed(0)
    return write_router(folder, LayerRouter(shape.layers, shape.head_dim), info)


def _engine(args: argparse.Namespace, shape: Shape, flux: dict[str, Any] | None) -> Engine:
    arguments: dict[str, Any] = {"attention_backend": args.baseline}
    if flux is not None:
        arguments = {"attention_backend": "flux", "additional_config": {"flux": flux}}
    return Engine(
        shape.vocab_size,
        model=str(args.model),
        load_format=args.load_format,
        dtype=args.dtype,
        max_model_len=max(args.contexts) + 4352,
        max_num_batched_tokens=args.chunk,
        worker_extension_cls="benchmarks.host_times.TimedWorker",
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.eager,
        disable_log_stats=True,
        **arguments,
    )


def _measure(
    engines: dict[str, Engine], args: argparse.Namespace, context: int
) -> list[dict[str, Any]]:
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    names = list(engines)
    for turn in range(args.repeats + 2):
        for name in names if turn % 2 else names[::-1]:
            engine = engines[name]
            prefill = engine.prefill_seconds(context, args.prefills)
            running = engine.start(context, 1)
            decode = engine.step_seconds(args.steps, 1)
            engine.stop(running)
            if turn >= 2:  # the first ones warm up, in both orders
                turns[name].append((prefill, 1000 * decode))
    return overhead_rows(turns, args.baseline, context)


def overhead_rows(
    turns: dict[str, list[tuple[float, float]]], baseline: str, context: int
) -> list[dict[str, Any]]:
    """Compare engines turn by turn, each with the baseline.

    Args:
        turns: by engine, of each turn (seconds to the first token, milliseconds a decode step); the
            baseline's control, where there is one, is among them.
        baseline: name of the engine to compare with.
        context: tokens of the prompts.

    Returns: a row an engine and metric; with a control also `against_control_percent` and
        `against_mean_percent` (of baseline and control), each with `..._interval_percent`.
    """
    rows = []
    for column, metric in enumerate(("ttft_s", "tpot_ms")):
        times = {name: [turn[column] for turn in found] for name, found in turns.items()}
        base, control = times[baseline], times.get(_control(baseline))
        for name, values in times.items():
            median, interval = longer_percent(values, base)
            row = {
                "metric": metric,
                "context": context,
                "policy": name,
                "overhead_percent": median,
                "interval_percent": interval,
                "median": statistics.median(values),
                "values": values,
            }
            if control is not None:
                mean = [(b + c) / 2 for b, c in zip(base, control, strict=True)]
                for key, others in (("against_control", control), ("against_mean", mean)):
                    median, interval = longer_percent(values, others)
                    row |= {f"{key}_percent": median, f"{key}_interval_percent": interval}
            rows.append(row)
    return rows


def describe(row: dict[str, Any]) -> str:
    """Write a row as a line."""
    line = f"{row['metric']} {row['context']:6d} tokens, {row['policy']:16s} "
    line += _percent(row["overhead_percent"], row["interval_percent"])
    line += f"  median {row['median']:.5f}"
    for key in ("control", "mean"):
        name = f"against_{key}"
        if f"{name}_percent" in row:
            found = row[f"{name}_percent"], row[f"{name}_interval_percent"]
            line += f"  against {key} {_percent(*found)}"
    return line


def _percent(median: float, interval: tuple[float, float]) -> str:
    return f"{median:+6.2f} % [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _control(baseline: str) -> str:
    """Name the second engine of the baseline."""
    return f"{baseline} again"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--load-format", default="auto", help="`dummy` for random weights (default auto)")
    add("--baseline", default="FLASH_ATTN", help="vLLM's own backend (CPU_ATTN on a CPU)")
    add("--contexts", type=int, nargs="+", default=[512, 2048, 8192], help="prompt tokens")
    add("--repeats", type=int, default=24, help="turns that count (default 24)")
    add("--prefills", type=int, default=5, help="prompts a turn, the median counts (default 5)")
    add("--steps", type=int, default=24, help="decode steps a turn (default 24)")
    add("--sink-tokens", type=int, default=128)
    add("--window-tokens", type=int, default=2048)
    add("--chunk", type=int, default=8192, help="max_num_batched_tokens (default 8192)")
    add("--kv-gib", type=float, default=4, help="KV cache of each engine, GiB (default 4)")
    add("--gpu-memory-utilization", type=float, default=0.25)
    add("--dtype", default="bfloat16")
    add("--eager", action="store_true", help="without CUDA graphs")
    add("--control", action="store_true",
        help="a second engine of the baseline: what two alike differ by")  # fmt: skip
    add("--profile", action="store_true", help="print a prefill's host times and GPU kernels too")
    add("--go", type=Path, help="wait for this file once the engines are loaded")
    return parser.parse_args()


if __name__ == "__main__":
    main()
