"""Serve a model with flux and with FLASH_ATTN in turns: time to first token, time per token.

    python -m benchmarks.bench_serve --model SHAPE_FOLDER --load-format dummy --out OUT.json

Both engines are alive at once, each in processes of its own on the same GPU (plans `*_one_by_one`:
one after the other, for what only one has memory for). Routes are policy `static`, switched between
measurements, so that one load serves every share of SPARSE layers; cases that mix rows give live
requests routes of their own.
Rows are written after every turn: a run that is cut short keeps what it measured. The kernels of
profiled prefills, and of decode steps of mixed rows, go into OUT.kernels.json beside them.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine_process import Engine
from benchmarks.row_file import RowFile, say, time_limit
from benchmarks.serve_cases import (
    PLANS,
    Decode,
    Prefill,
    Row,
    Shape,
    default_chunk,
    longest_context,
)


def main() -> None:
    """Measure what the arguments ask for."""
    args = _parse()
    shape = Shape.read(args.model)
    rows = RowFile(args.out)
    settings: dict[str, Any] = {}

    def keep(row: Row) -> None:
        key = row.metric, row.context, row.batch, row.sparse_share, row.mixed
        rows.keep(key, row.as_dict() | {"engines": settings}, str(row))

    common = {"vocab_size": shape.vocab_size, **_arguments(args)}
    start_base = partial(Engine, attention_backend=args.baseline, **common)
    start_flux = partial(Engine, attention_backend="flux", additional_config=_flux(args), **common)
    if args.plan.endswith("_one_by_one"):
        _measure_one_by_one(args, shape, start_base, start_flux, keep, settings)
        return
    with start_base() as base, start_flux() as flux:
        for engine in (base, flux):
            engine.wait()
        settings |= {"flash_attn": base.settings(), "flux": flux.settings()}
        say("both engines are loaded")
        while args.go is not None and not args.go.exists():
            time.sleep(0.2)
        _measure(args, shape, base, flux, keep)


def _measure(
    args: argparse.Namespace,
    shape: Shape,
    base: Engine,
    flux: Engine,
    keep: Callable[[Row], None],
) -> None:
    in_time = time_limit(args.seconds)
    kernels = RowFile(args.out.with_suffix(".kernels.json"))
    flux.fix_routes(shape.spread(0.5))
    for engine in (base, flux):  # compiles what only a second chunk uses
        engine.prefill_seconds(min(args.chunk + args.chunk // 2, longest_context(args.plan)))
    shortest: dict[int, float] = {}
    saved: dict[int, float | None] = {}
    for planned in PLANS[args.plan]:
        case = _possible(planned, shape)
        if isinstance(case, Prefill):
            if case.context not in saved and in_time():
                saved[case.context] = _most_saved(shape, base, flux, case.context, kernels)
            _measure_prefill(shape, base, flux, case, keep, in_time, saved.get(case.context))
        else:
            _measure_decode(
                args, shape, base, flux, case, keep, in_time, shortest=shortest, kernels=kernels
            )


def _possible(case: Prefill | Decode, shape: Shape) -> Prefill | Decode:
    """Give a case the shares that whole layers, or rows, can have."""
    if isinstance(case, Decode) and case.mixed:
        return replace(case, shares=tuple(round(f * case.batch) / case.batch for f in case.shares))
    return replace(case, shares=shape.shares(case.shares))


def _measure_prefill(
    shape: Shape,
    base: Engine,
    flux: Engine,
    case: Prefill,
    keep: Callable[[Row], None],
    in_time: Callable[[], bool],
    saved: float | None,
) -> None:
    base_values: list[float] = []
    values: dict[float, list[float]] = {share: [] for share in case.shares}
    for _ in range(case.repeats):
        if not in_time():
            return
        base_values.append(base.prefill_seconds(case.context))
        base_memory = base.peak_memory()
        memory = {}
        for share in case.shares:
            flux.fix_routes(shape.spread(share))
            values[share].append(flux.prefill_seconds(case.context))
            memory[share] = flux.peak_memory()
        for share in case.shares:
            ideal = None if saved is None else statistics.median(base_values) - share * saved
            row = Row("ttft_s", case.context, 1, share, ideal, values[share], base_values)
            row.flux_memory, row.flash_attn_memory = memory[share], base_memory
            keep(row)


def _most_saved(
    shape: Shape, base: Engine, flux: Engine, context: int, rows: RowFile
) -> float | None:
    """Return L * (a_full - a_window) in seconds; None where no FlashAttention kernel runs."""

    def attention_ms(engine: Engine, name: str) -> float:
        row = kernel_row(name, context, engine.profile(context))
        # What a prefill costs beside its attention; the ideal takes it as the same for both.
        line = f"{context} tokens, {name}: kernels {row['total_ms']:.1f} ms, "
        rows.keep((context, name), row, f"{line}{row['attention_ms']:.1f} of attention")
        for kernel in row["kernels"][:8]:
            say(f"  {kernel['ms']:9.1f} ms {kernel['calls']:6d} x  {kernel['name'][:90]}")
        return row["attention_ms"]

    flux.fix_routes(shape.spread(1.0))
    full, window = attention_ms(base, "baseline"), attention_ms(flux, "flux, all SPARSE")
    return (full - window) / 1000 if full else None


def kernel_row(name: str, context: int, kernels: list[tuple[str, int, float]]) -> dict[str, Any]:
    """Make a row of the kernels of one prefill, or decode step.

    Args:
        name: of the engine.
        context: tokens of a prompt.
        kernels: name, calls, total milliseconds; longest first.
    """
    return {
        "engine": name,
        "context": context,
        "total_ms": sum(ms for _, _, ms in kernels),
        "attention_ms": sum(ms for kernel, _, ms in kernels if "FlashAttnFwd" in kernel),
        "kernels": [{"name": kernel, "calls": calls, "ms": ms} for kernel, calls, ms in kernels],
    }


def _measure_decode(
    args: argparse.Namespace,
    shape: Shape,
    base: Engine,
    flux: Engine,
    case: Decode,
    keep: Callable[[Row], None],
    in_time: Callable[[], bool],
    shortest: dict[int, float],
    kernels: RowFile,
) -> None:
    if not in_time():
        return

    def step_ms(engine: Engine) -> float:
        return _step_ms(args, engine, case.batch)

    if case.batch not in shortest:
        names = base.start(args.sink_tokens + args.window_tokens, case.batch)
        shortest[case.batch] = statistics.median(step_ms(base) for _ in range(case.repeats))
        base.stop(names)
    running = [(engine, engine.start(case.context, case.batch, False)) for engine in (base, flux)]
    base_values: list[float] = []
    values: dict[float, list[float]] = {share: [] for share in case.shares}
    for turn in range(case.repeats + 1):
        for share in case.shares:
            # Both engines take as many steps, so that their contexts grow alike.
            if case.mixed:
                flux.mix_rows(round(share * case.batch))
            else:
                flux.fix_routes(shape.spread(share))
            pair = step_ms(base), step_ms(flux)
            if turn:  # the first warms up
                base_values.append(pair[0])
                values[share].append(pair[1])
    if case.mixed:
        _profile_mixed(args, base, flux, case, kernels)
    for engine, names in running:
        engine.stop(names)
    _keep_decode(case, values, base_values, shortest[case.batch], keep)


def _profile_mixed(
    args: argparse.Namespace, base: Engine, flux: Engine, case: Decode, rows: RowFile
) -> None:
    """Keep the kernels of a decode step, the mean of some, by how many rows are SPARSE."""

    def profile(engine: Engine, name: str) -> None:
        engine.step_seconds(4, case.batch)
        found = engine.profile_steps(args.steps, case.batch)
        a_step = [(kernel, n // args.steps, ms / args.steps) for kernel, n, ms in found]
        row = kernel_row(name, case.context, a_step) | {"batch": case.batch}
        line = f"{case.context} x {case.batch}, {name}: kernels {row['total_ms']:.3f} ms a step, "
        key = case.context, case.batch, name
        rows.keep(key, row, f"{line}{row['attention_ms']:.3f} of attention")

    profile(base, "baseline")
    for share in (0.0, *case.shares, 1.0):
        flux.mix_rows(round(share * case.batch))
        profile(flux, f"flux, {round(share * case.batch)} rows SPARSE")


def _step_ms(args: argparse.Namespace, engine: Engine, batch: int) -> float:
    engine.step_seconds(4, batch)  # steps in flight had the routes before
    return 1000 * engine.step_seconds(args.steps, batch)


def _keep_decode(
    case: Decode,
    values: Mapping[float, list[float]],
    base_values: list[float],
    shortest: float,
    keep: Callable[[Row], None],
) -> None:
    """Keep a row a share; `shortest` is the baseline's step at S + W tokens, ms."""
    longest = statistics.median(base_values)
    for share in case.shares:
        ideal = longest - share * (longest - shortest)
        times = values[share], base_values
        place = case.context, case.batch, share
        keep(Row("tpot_ms", *place, ideal, *times, mixed=case.mixed))


def _measure_one_by_one(
    args: argparse.Namespace,
    shape: Shape,
    start_base: Callable[[], Engine],
    start_flux: Callable[[], Engine],
    keep: Callable[[Row], None],
    settings: dict[str, Any],
) -> None:
    """Measure decode with the baseline, end it, and measure flux: not in turns.

    Each engine's settings are noted in `settings`, which rows carry.
    """
    cases = [
        replace(case, shares=shape.shares(case.shares))
        for case in PLANS[args.plan]
        if isinstance(case, Decode)
    ]
    base_values: dict[Decode, list[float]] = {}
    shortest: dict[int, float] = {}
    with start_base() as base:
        settings["flash_attn"] = base.settings()
        for case in cases:
            if case.batch not in shortest:
                context = args.sink_tokens + args.window_tokens
                times = _decode_alone(args, base, case, context, {0.0: None})
                shortest[case.batch] = statistics.median(times[0.0])
            base_values[case] = _decode_alone(args, base, case, case.context, {0.0: None})[0.0]
            say(f"{args.baseline}: {statistics.median(base_values[case]):.3f} ms a step")
    with start_flux() as flux:
        settings["flux"] = flux.settings()
        for case in cases:
            routes = {share: shape.spread(share) for share in case.shares}
            values = _decode_alone(args, flux, case, case.context, routes)
            _keep_decode(case, values, base_values[case], shortest[case.batch], keep)


def _decode_alone(
    args: argparse.Namespace,
    engine: Engine,
    case: Decode,
    context: int,
    routes: Mapping[float, list[int] | None],
) -> dict[float, list[float]]:
    """Time decode steps under each of some routes (None: the baseline has none) in turns, in ms."""
    names = engine.start(context, case.batch, False)
    values: dict[float, list[float]] = {share: [] for share in routes}
    for turn in range(case.repeats + 1):
        for share, layers in routes.items():
            if layers is not None:
                engine.fix_routes(layers)
            value = _step_ms(args, engine, case.batch)
            if turn:  # the first warms up
                values[share].append(value)
    engine.stop(names)
    return values


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
    cases = PLANS[args.plan]
    return {
        "model": str(args.model),
        "load_format": args.load_format,
        "dtype": args.dtype,
        "max_model_len": longest_context(args.plan) + 4352,  # and what decodes
        "max_num_batched_tokens": args.chunk,
        "max_num_seqs": max([case.batch for case in cases if isinstance(case, Decode)], default=1),
        "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "enforce_eager": args.eager,
        "disable_log_stats": True,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--plan", choices=sorted(PLANS), default="8b", help="what to measure (default 8b)")
    add("--load-format", default="auto", help="`dummy` for random weights (default auto)")
    add("--baseline", default="FLASH_ATTN", help="attention backend to compare with")
    add("--sink-tokens", type=int, default=128)
    add("--window-tokens", type=int, default=2048)
    add(
        "--chunk",
        type=int,
        help="max_num_batched_tokens (default 8192; one_chunk: the longest prompt)",
    )
    add("--steps", type=int, default=24, help="decode steps a turn (default 24)")
    add("--kv-gib", type=float, default=44, help="KV cache of each engine, GiB (default 44)")
    add("--gpu-memory-utilization", type=float, default=0.45)
    add("--dtype", default="bfloat16")
    add("--eager", action="store_true", help="without CUDA graphs")
    add("--seconds", type=float, help="begin no turn after so many seconds")
    add("--go", type=Path, help="wait for this file once both engines are loaded")
    args = parser.parse_args()
    args.chunk = args.chunk or default_chunk(args.plan)
    if args.plan.endswith("_one_by_one") and (args.seconds is not None or args.go is not None):
        parser.error(
            "--seconds and --go: expected a plan whose engines live side by side, found "
            f"--plan {args.plan}; leave them out"
        )
    return args


if __name__ == "__main__":
    main()
