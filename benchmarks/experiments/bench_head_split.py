"""Layer-level routes against a head-level split of the same sparsity.

    python -m benchmarks.experiments.bench_head_split --model SHAPE_FOLDER \\
        --load-format dummy --out OUT.json

Half of the attention is SPARSE in both. Layer-level: half of the layers, each with all its heads.
Head-level: in each layer half of the KV head groups (`head_split.py`: two attention calls on slices
of the heads, the sparse one over the same compacted views). A static hybrid, whose SPARSE layers
are the same for all requests, makes the very calls of the layer-level routes measured here: its
cost is theirs.

Part `layer` times one attention layer at the Llama-3.1-8B shape in CUDA graphs (`layer_us` rows):
layer-level is the mean of a FULL and a SPARSE layer. `side_by_side` lets the two calls of the split
run at once on two streams, which no engine of ours does. Ideal: the mean of FLASH_ATTN over every
key and over what SPARSE leaves (decode: sink + window tokens; prefill: the window alone).
Part `engine` serves the model (`ttft_s` and `tpot_ms` rows) with FLASH_ATTN, flux and flux with
split heads in turns, all alive at once. Ideal: the mean of FLASH_ATTN and of flux with all layers
SPARSE.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_process import Engine
from benchmarks.experiments.head_split_layer import HEADS, LAYER_CASES, LAYERS, SHARE, measure_layer
from benchmarks.row_file import RowFile, say, time_limit
from benchmarks.serve_cases import CHUNK, K, Shape

BASE = "flash_attn"


def main() -> None:
    """Measure the parts that the arguments ask for."""
    args = _parse()
    rows, in_time = RowFile(args.out), time_limit(args.seconds)
    if "layer" in args.parts:
        from flux_vllm.attention_backend.kernels import fa3

        if not fa3.is_available():
            raise SystemExit(
                "part `layer`: expected a Hopper GPU with vLLM's FlashAttention-3, found none; "
                "leave the part out with --parts engine"
            )
        for case in LAYER_CASES:
            if in_time():
                measure_layer(case, rows)
                gc.collect()
                torch.cuda.empty_cache()  # the engines need it
    if "engine" in args.parts and in_time():
        _measure_engines(args, rows, in_time)


def _measure_engines(args: argparse.Namespace, rows: RowFile, in_time: Callable[[], bool]) -> None:
    shape = Shape.read(args.model)
    arguments = _arguments(args)
    flux = {
        "attention_backend": "flux",
        "additional_config": {
            "flux": {
                "policy": "static",
                "sparse_layers": [],
                "sink_tokens": args.sink_tokens,
                "window_tokens": args.window_tokens,
            }
        },
    }
    kinds: dict[str, dict[str, Any]] = {
        BASE: {"attention_backend": args.baseline},
        LAYERS: flux,
        HEADS: flux | {"worker_extension_cls": "benchmarks.experiments.head_split.HeadSplitWorker"},
    }
    engines = {name: Engine(shape.vocab_size, **(arguments | kinds[name])) for name in args.engines}
    with ExitStack() as stack:
        for engine in engines.values():
            stack.enter_context(engine)
        for name, engine in engines.items():
            engine.wait()
            say(f"loaded: {name}")
        while args.go is not None and not args.go.exists():
            time.sleep(0.2)
        if HEADS in engines:
            engines[HEADS].fix_routes(range(shape.layers))
        engines[LAYERS].fix_routes(shape.spread(SHARE))
        for engine in engines.values():  # compiles what only a second chunk uses
            engine.prefill_seconds(min(args.chunk + args.chunk // 2, max(_contexts(args))))
        if HEADS in engines:
            engines[HEADS].call_worker("check_heads_are_split")
        for context, batch in args.decode:
            if in_time():
                _measure_decode(args, shape, engines, context, batch, rows)
        for context in args.prefill:
            _measure_prefill(args, shape, engines, context, rows, in_time)


def _measure_decode(
    args: argparse.Namespace,
    shape: Shape,
    engines: dict[str, Engine],
    context: int,
    batch: int,
    rows: RowFile,
) -> None:
    def step_ms(engine: Engine) -> float:
        engine.step_seconds(4, batch)  # steps in flight had the routes before
        return 1000 * engine.step_seconds(args.steps, batch)

    running = {name: engine.start(context, batch, False) for name, engine in engines.items()}
    values: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(args.repeats + 1):
        for name, engine in engines.items():
            milliseconds = step_ms(engine)
            if turn:  # the first warms up
                values[name].append(milliseconds)
    engines[LAYERS].fix_routes(range(shape.layers))
    sparse = [step_ms(engines[LAYERS]) for _ in range(args.repeats)]
    engines[LAYERS].fix_routes(shape.spread(SHARE))
    for name, engine in engines.items():
        engine.stop(running[name])
    _keep(rows, "tpot_ms", context, batch, values, sparse)


def _measure_prefill(
    args: argparse.Namespace,
    shape: Shape,
    engines: dict[str, Engine],
    context: int,
    rows: RowFile,
    in_time: Callable[[], bool],
) -> None:
    values: dict[str, list[float]] = {name: [] for name in engines}
    sparse: list[float] = []
    for _ in range(args.repeats):
        if not in_time():
            return
        for name, engine in engines.items():
            values[name].append(engine.prefill_seconds(context))
        engines[LAYERS].fix_routes(range(shape.layers))
        sparse.append(engines[LAYERS].prefill_seconds(context))
        engines[LAYERS].fix_routes(shape.spread(SHARE))
        _keep(rows, "ttft_s", context, 1, values, sparse)


def _keep(
    rows: RowFile,
    metric: str,
    context: int,
    batch: int,
    values: dict[str, list[float]],
    sparse: list[float],
) -> None:
    row = engine_row(metric, context, batch, values, sparse)
    figures = ", ".join(f"{name} {row[name]:.4f}" for name in (*values, "ideal") if row[name])
    rows.keep((metric, context, batch), row, f"{metric} {context:7d} x {batch:2d}: {figures}")


def engine_row(
    metric: str,
    context: int,
    batch: int,
    values: dict[str, list[float]],
    sparse: list[float],
) -> dict[str, Any]:
    """Make a row of what the engines took.

    Args:
        metric: `ttft_s` or `tpot_ms`.
        context: tokens of each prompt.
        batch: rows.
        values: by engine, in the metric's unit.
        sparse: of flux with all layers SPARSE.
    """
    medians = {name: statistics.median(times) for name, times in values.items()}
    ideal = None
    if BASE in medians:
        ideal = statistics.mean((medians[BASE], statistics.median(sparse)))
    return {
        "metric": metric,
        "context": context,
        "batch": batch,
        "sparse_share": SHARE,
        **medians,
        "all_sparse": statistics.median(sparse),
        "ideal": ideal,
        "values": values | {"all_sparse": sparse},
    }


def _contexts(args: argparse.Namespace) -> list[int]:
    return [*args.prefill, *(context for context, _ in args.decode)]


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": str(args.model),
        "load_format": args.load_format,
        "dtype": args.dtype,
        "max_model_len": max(_contexts(args)) + 4352,  # and what decodes
        "max_num_batched_tokens": args.chunk,
        "max_num_seqs": max([batch for _, batch in args.decode], default=1),
        "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "enforce_eager": args.eager,
        "disable_log_stats": True,
    }


def decode_case(text: str) -> tuple[int, int]:
    """Read CONTEXTxROWS.

    Raises: ValueError: something else.
    """
    context, rows = text.split("x")
    return int(context), int(rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--parts", nargs="+", choices=("layer", "engine"), default=["layer", "engine"])
    add("--engines", nargs="+", choices=(BASE, LAYERS, HEADS), default=[BASE, LAYERS, HEADS],
        help=f"to have alive ({LAYERS} must be)")  # fmt: skip
    add("--decode", nargs="*", type=decode_case, metavar="CONTEXTxROWS",
        default=[(32 * K, 1), (128 * K, 1), (8 * K, 16)],
        help="decode to time (default 32768x1 131072x1 8192x16)")  # fmt: skip
    add("--prefill", nargs="*", type=int, default=[64 * K, 128 * K], metavar="TOKENS",
        help="prompts to time (default 65536 131072)")  # fmt: skip
    add("--load-format", default="auto", help="`dummy` for random weights (default auto)")
    add("--baseline", default="FLASH_ATTN", help="vLLM's own backend (CPU_ATTN on a CPU)")
    add("--sink-tokens", type=int, default=128)
    add("--window-tokens", type=int, default=2048)
    add("--chunk", type=int, default=CHUNK, help="max_num_batched_tokens (default 8192)")
    add("--repeats", type=int, default=5, help="turns that count (default 5)")
    add("--steps", type=int, default=24, help="decode steps a turn (default 24)")
    add("--kv-gib", type=float, default=18.5, help="KV cache of each engine, GiB (default 18.5)")
    add("--gpu-memory-utilization", type=float, default=0.25)
    add("--dtype", default="bfloat16")
    add("--eager", action="store_true", help="without CUDA graphs")
    add("--seconds", type=float, help="begin nothing new after so many seconds")
    add("--go", type=Path, help="wait for this file once the engines are loaded")
    args = parser.parse_args()
    if "engine" in args.parts and LAYERS not in args.engines:
        parser.error(f"--engines: expected {LAYERS} among them, found {args.engines}; add it")
    return args


if __name__ == "__main__":
    main()
