"""What a probe costs: the first token with a router, and with the same routes given, in turns.

    python -m benchmarks.bench_probe --model SHAPE_FOLDER --load-format dummy --out OUT.json

Three engines live side by side: policy `static` with some layers SPARSE (the routes given), policy
`router` with a router that decides these very routes for every prompt (probed), and a second
`static` one, which differs from the first by what two equal engines differ by. What remains between
the first two is the probe. Rows say by how much longer the first token took than with the routes
given, in the same turn: the median over turns, with a bootstrap 95 % interval. Prompts of up to
S + W tokens are not probed.

Two more figures follow: a probe alone, waited for; and the host time of a prefill, by function.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_process import Engine
from benchmarks.host_times import TimedWorker
from benchmarks.row_file import RowFile, say, time_limit
from benchmarks.serve_cases import K, Shape
from benchmarks.turns import longer_percent
from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.router.route import Route
from flux_vllm.routing.prompts import Prompt

GIVEN, PROBED, CONTROL = "given", "probed", "given again"
_PROBES = 20
_TIMED_PREFILLS = 10


class ProbeWorker(TimedWorker):
    """A worker that times its probe apart from any request."""

    @torch.inference_mode()  # as vLLM's steps, whose tensors nothing else may write to
    def time_probes(self: Any) -> tuple[list[float], list[float]]:
        """Return seconds of some probes, one after another: until launched, until done."""
        runtime = self.flux_status.__self__
        prompt = Prompt("timed", 8 * K, [1] * (8 * K))
        launched, done = [], []
        for _ in range(_PROBES):
            _wait_for_device()
            begin = time.perf_counter()
            runtime.probe.decide(prompt)
            launched.append(time.perf_counter() - begin)
            _wait_for_device()
            done.append(time.perf_counter() - begin)
        return launched, done


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_fixed_router(
    folder: Path, shape: Shape, sparse_layers: Sequence[int], sink_tokens: int, window_tokens: int
) -> Path:
    """Write a router that decides the same for every prompt, and return its path.

    Like a router that training fits to costs by its defaults, it looks at one layer's queries and
    at nothing of its own layer.
    """
    info = RouterInfo(
        base_model="",
        num_layers=shape.layers,
        head_dim=shape.head_dim,
        pool_tokens=1,
        sink_tokens=sink_tokens,
        window_tokens=window_tokens,
        pools=("tail:1", "length", f"overlap:{window_tokens}"),
        context_layers=(round(0.65 * (shape.layers - 1)),),
        widths=(16, 16, 16, 16),
    )
    router = info.make_router()
    weight, bias = router.linear("head.4")
    with torch.no_grad():
        router.linear("features.0")[0][..., : len(info.pools) * shape.head_dim] = 0
        weight.zero_()
        bias.zero_()
        for layer in range(shape.layers):
            route = Route.SPARSE if layer in sparse_layers else Route.FULL
            bias[layer, route] = 4.0
    return write_router(folder, router, info)


def main() -> None:
    """Measure and write a row a context, then the probe's own time and the host's."""
    args = _parse()
    shape = Shape.read(args.model)
    sparse_layers = shape.spread(args.share)
    rows = RowFile(args.out)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        window = args.sink_tokens, args.window_tokens
        router = write_fixed_router(Path(folder), shape, sparse_layers, *window)
        given = {
            "policy": "static",
            "sparse_layers": sparse_layers,
            "sink_tokens": args.sink_tokens,
            "window_tokens": args.window_tokens,
        }
        configs = {GIVEN: given, PROBED: {"router": str(router)}, CONTROL: given}
        engines = {
            name: stack.enter_context(_engine(args, shape, flux)) for name, flux in configs.items()
        }
        for engine in engines.values():
            engine.wait()
        say("all engines are loaded")
        while args.go is not None and not args.go.exists():
            time.sleep(0.2)
        settings = engines[PROBED].settings() | {"sparse_layers": sparse_layers}
        _measure_probe(engines[PROBED], rows)
        _measure_first_tokens(engines, args, settings, rows)
        check_routes(engines[PROBED].call_worker("flux_status"), sparse_layers)
        for name in (GIVEN, PROBED):
            _measure_host(engines[name], name, args.contexts[1], rows)


def check_routes(status: dict[str, Any], sparse_layers: Sequence[int]) -> None:
    """Check that the probed prompts had the routes that the other engines were given.

    Args:
        status: of the worker's runtime.
        sparse_layers: that were given.

    Raises: RuntimeError: other routes, or none.
    """
    wanted = [
        int(Route.SPARSE if layer in sparse_layers else Route.FULL)
        for layer in status["routed_layers"]
    ]
    found = [decision["routes"] for decision in status["recent"]]
    if not found or any(routes != wanted for routes in found):
        raise RuntimeError(f"expected probed prompts with the routes {wanted}, found {found[:1]}")


def _measure_probe(engine: Engine, rows: RowFile) -> None:
    launched, done = ([1000 * s for s in times] for times in engine.call_worker("time_probes"))
    row = {"metric": "probe_ms", "launched": launched, "done": done}
    medians = f"{statistics.median(launched):.3f} ms until launched"
    rows.keep("probe", row, f"a probe: {medians}, {statistics.median(done):.3f} ms until done")


def _measure_first_tokens(
    engines: dict[str, Engine], args: argparse.Namespace, settings: dict[str, Any], rows: RowFile
) -> None:
    in_time = time_limit(args.seconds)
    times: dict[int, dict[str, list[float]]] = {
        context: {name: [] for name in engines} for context in args.contexts
    }
    for context in args.contexts:  # compiles what they use; the longest uses nothing else
        for engine in engines.values():
            engine.prefill_seconds(min(context, 4 * args.chunk), 2)
    names = list(engines)
    for turn in range(max(args.repeats)):
        for context, repeats in zip(args.contexts, args.repeats, strict=True):
            if turn >= repeats or not in_time():
                continue
            for name in names if turn % 2 else names[::-1]:
                times[context][name].append(engines[name].prefill_seconds(context, args.prefills))
            if turn:
                _keep(context, times[context], settings, rows)


def _keep(
    context: int, times: dict[str, list[float]], settings: dict[str, Any], rows: RowFile
) -> None:
    row = first_token_row(context, times)
    line = f"{context:6d} tokens, {len(times[GIVEN]):2d} turns: "
    for name in (PROBED, CONTROL):
        percent, (low, high) = row[name]["percent"], row[name]["interval_percent"]
        line += f"{name} {percent:+.2f} % [{low:+.2f}, {high:+.2f}]  "
    line += f"median {row['given_seconds']:.4f} s"
    rows.keep(context, row | {"engine": settings}, line)


def first_token_row(context: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Compare the first token with the engine whose routes were given, turn by turn.

    Args:
        context: tokens of the prompts.
        times: seconds of each turn, by engine.
    """
    row: dict[str, Any] = {
        "metric": "ttft_s",
        "context": context,
        "given_seconds": statistics.median(times[GIVEN]),
        "values": times,
    }
    for name in (PROBED, CONTROL):
        percent, interval = longer_percent(times[name], times[GIVEN])
        row[name] = {
            "percent": percent,
            "interval_percent": interval,
            "seconds": statistics.median(times[name]),
        }
    return row


def _measure_host(engine: Engine, name: str, context: int, rows: RowFile) -> None:
    engine.call_worker("begin_host_times")
    engine.prefill_seconds(context, _TIMED_PREFILLS)
    times = engine.call_worker("end_host_times")
    micros = {
        function: {"us": 1e6 * seconds / _TIMED_PREFILLS, "calls": calls / _TIMED_PREFILLS}
        for function, (calls, seconds) in times.items()
    }
    row = {"metric": "host_us", "context": context, "engine": name, "functions": micros}
    lines = [f"{name}, {context} tokens: host time of a prefill, each with what it calls"]
    lines += [f"  {t['us']:9.0f} us {t['calls']:5.1f} x  {f}" for f, t in micros.items()]
    rows.keep(("host", name), row, "\n".join(lines))


def _engine(args: argparse.Namespace, shape: Shape, flux: dict[str, Any]) -> Engine:
    return Engine(
        shape.vocab_size,
        model=str(args.model),
        load_format=args.load_format,
        dtype=args.dtype,
        attention_backend="flux",
        additional_config={"flux": flux},
        max_model_len=max(args.contexts) + 16,
        max_num_batched_tokens=args.chunk,
        max_num_seqs=16,
        worker_extension_cls="benchmarks.bench_probe.ProbeWorker",
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.eager,
        disable_log_stats=True,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--load-format", default="auto", help="`dummy` for random weights (default auto)")
    add("--share", type=float, default=0.75, help="of SPARSE layers (default 0.75)")
    add("--contexts", type=int, nargs="+", default=[2 * K, 8 * K, 32 * K, 128 * K],
        help="prompt tokens; host times are taken at the second")  # fmt: skip
    add("--repeats", type=int, nargs="+", default=[24, 24, 12, 6], help="turns of each context")
    add("--prefills", type=int, default=1, help="prompts a turn, the median counts (default 1)")
    add("--sink-tokens", type=int, default=128)
    add("--window-tokens", type=int, default=2048)
    add("--chunk", type=int, default=8 * K, help="max_num_batched_tokens (default 8192)")
    add("--kv-gib", type=float, default=18, help="KV cache of each engine, GiB (default 18)")
    add("--gpu-memory-utilization", type=float, default=0.28)
    add("--dtype", default="bfloat16")
    add("--eager", action="store_true", help="without CUDA graphs")
    add("--seconds", type=float, help="begin no turn after so many seconds")
    add("--go", type=Path, help="wait for this file once the engines are loaded")
    args = parser.parse_args()
    if len(args.contexts) != len(args.repeats) or len(args.contexts) < 2:
        parser.error(
            f"--repeats: expected one number a context, of two at least, found "
            f"{len(args.repeats)} for {len(args.contexts)}; give as many of both"
        )
    return args


if __name__ == "__main__":
    main()
