r"""Is flux ever slower than plain vLLM? Decode, first tokens and mixed steps, engines in turns.

    python -m benchmarks.bench_never_slower --model SHAPE_FOLDER --load-format dummy --out OUT.json

Of a hybrid, whose rows each take a block of states (8 GiB hold fewer than the 1,024 rows that vLLM
would capture graphs for on an H200, and it refuses to start; vLLM compiles FlashInfer's kernels
for its linear layers where they are not told to use Triton's):

    python -m benchmarks.bench_never_slower --model benchmarks/shapes/qwen3.5-9b \
        --load-format dummy --kv-gib 8 --gpu-memory-utilization 0.3 --policies static \
        --engine-arguments '{"max_num_seqs": 256,
            "additional_config": {"gdn_prefill_backend": "triton"}}' --out OUT.json

All engines are alive at once on one GPU, each in processes of its own: vLLM's backend twice (what
two alike differ by), and flux under the policies asked for. `static` has a share of its layers
SPARSE, evenly spread; `router` a random router with the threshold that comes next to the share.
While one engine is timed the others are stopped: what waits for the host takes longer where that
is busy. What an engine does first after its pause does not count.

A decode time is that of so many steps in which all rows decode, (T(n + steps) - T(n)) by steps. The
first prompts that come beside running requests are timed before anything else.

Cells are measured in the order given, and rows are written after each: a run that is cut short
keeps what it measured. A lock keeps two runs off one GPU.
"""

import argparse
import fcntl
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench_overhead import write_random_router
from benchmarks.bench_serve import kernel_row
from benchmarks.engine_process import Engine
from benchmarks.never_slower_cases import (
    BASELINE,
    CONTROL,
    Cell,
    decode_ideal,
    describe,
    rows_of,
)
from benchmarks.row_file import RowFile, say, time_limit
from benchmarks.serve_cases import Shape
from benchmarks.turns import in_turns

_CELLS = [
    *("decode:1024x1", "decode:1024x16", "decode:1024x64", "ttft:300", "ttft:1000", "ttft:4000"),
    *("ttft:8000", "decode:8192x1", "decode:8192x16", "decode:31000x1", "decode:31000x16"),
    *("mixed:8192x16+4000", "ttft:16000", "ttft:31000"),
]
_HOST_STEPS = 100
_STEPS_AFTER_A_PAUSE = 8
_FIRST_MIXED = 4
_PRINTED_KERNELS = 16


def main() -> None:
    """Measure the cells that the arguments ask for."""
    args = _parse()
    shape = Shape.read(args.model)
    with gpu_lock(), tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        begin = time.monotonic()
        engines = {
            name: stack.enter_context(engine)
            for name, engine in _engines(args, shape, Path(folder)).items()
        }
        for engine in engines.values():
            engine.wait()
        say(f"{len(engines)} engines are loaded after {time.monotonic() - begin:.0f} s")
        _Run(args, shape, engines).measure()


@contextmanager
def gpu_lock() -> Iterator[None]:
    """Keep other runs off the GPUs that this process sees."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "-")
    path = Path(tempfile.gettempdir()) / f"flux-benchmark-{gpus}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _engines(args: argparse.Namespace, shape: Shape, folder: Path) -> dict[str, Engine]:
    sizes = {"sink_tokens": args.sink_tokens, "window_tokens": args.window_tokens}
    flux: dict[str, dict[str, Any]] = {
        "full": {"policy": "full"},
        "static": {"policy": "static", "sparse_layers": shape.spread(args.share), **sizes},
    }
    if "router" in args.policies:
        router = write_random_router(shape, folder, args.sink_tokens, args.window_tokens)
        flux["router"] = {"router": str(router)}
    engines = {name: _engine(args, shape, None) for name in (BASELINE, CONTROL)}
    return engines | {name: _engine(args, shape, flux[name]) for name in args.policies}


def _engine(args: argparse.Namespace, shape: Shape, flux: dict[str, Any] | None) -> Engine:
    return Engine(
        shape.vocab_size,
        model=str(args.model),
        load_format=args.load_format,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        worker_extension_cls="benchmarks.host_times.TimedWorker",
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        gpu_memory_utilization=args.gpu_memory_utilization,
        disable_log_stats=True,
        **backend_arguments(args.engine_arguments, args.baseline, flux),
    )


def backend_arguments(
    shared: Mapping[str, Any], baseline: str, flux: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what all engines share, with vLLM's own backend or with flux beside the rest."""
    if flux is None:
        return {"attention_backend": baseline, **shared}
    additional = shared.get("additional_config", {}) | {"flux": flux}
    return {**shared, "attention_backend": "flux", "additional_config": additional}


class _Run:
    """One run over loaded engines."""

    def __init__(
        self, args: argparse.Namespace, shape: Shape, engines: Mapping[str, Engine]
    ) -> None:
        self._args = args
        self._shape = shape
        self._engines = engines
        self._rows = RowFile(args.out)
        self._in_time = time_limit(args.seconds)
        self._shortest: dict[int, float] = {}
        self._saved: dict[int, float] = {}
        self._shares = {"static": shape.shares([args.share])[0]}

    def measure(self) -> None:
        """Measure the first mixed batches, where the host's time goes, then the cells."""
        if self._args.first_mixed:
            self._first_mixed()
        if "router" in self._engines:
            engine = self._engines["router"]
            prompt = self._args.sink_tokens + self._args.window_tokens + 1000
            self._shares["router"] = engine.set_sparse_share(self._args.share, prompt)
            say(f"router: {self._shares['router']:.3f} of the layers are SPARSE")
        for batch in self._args.host:
            self._host_times(batch)
        for context in self._args.profile:
            self._print_kernels(context)
        for cell in self._args.cells:
            if not self._in_time():
                say(f"no time is left for {cell}")
                return
            begin = time.monotonic()
            self._measure_cell(cell)
            say(f"  ({time.monotonic() - begin:.1f} s)")

    def _first_mixed(self) -> None:
        """Time the first prompts beside running requests, each engine's first of all."""
        context, batch, prompt = 500, 4, 3000
        for name, engine in self._engines.items():
            running = engine.start(context, batch)
            first, *rest = engine.mixed_seconds(prompt, batch, _FIRST_MIXED)
            engine.stop(running)
            after = statistics.median(rest)
            row = {
                "shape": self._args.model.name,
                "what": "first_mixed_ms",
                "policy": name,
                "context": context,
                "batch": batch,
                "prompt": prompt,
                "first": 1000 * first,
                "next": 1000 * after,
                "ratio": first / after,
            }
            line = f"first mixed batch {name:16s} {1000 * first:8.1f} ms, next {1000 * after:8.1f}"
            self._rows.keep(("first", name), row, f"{line}: {first / after:.2f}x")

    def _measure_cell(self, cell: Cell) -> None:
        args, ideals = self._args, {}
        if cell.what == "ttft_ms":
            values = self._turns(lambda e: self._prefill_ms(e, cell.context))
            ideals = self._prefill_ideals(cell, statistics.median(values[BASELINE]))
        elif cell.what == "decode_ms":
            values = self._decode(cell.context, cell.batch, self._engines)
            ideals = self._decode_ideals(cell, statistics.median(values[BASELINE]))
        else:
            values = self._running(
                cell.context,
                cell.batch,
                self._engines,
                lambda e: 1000 * statistics.median(e.mixed_seconds(cell.prompt, cell.batch, 3)),
            )
        for row in rows_of(args.model.name, cell, values, self._shares, ideals):
            self._rows.keep((str(cell), row["policy"]), row, describe(row))

    def _prefill_ms(self, engine: Engine, context: int) -> float:
        engine.prefill_seconds(context)  # after its pause
        return 1000 * engine.prefill_seconds(context, self._args.prompts)

    def _step_ms(self, engine: Engine, batch: int) -> float:
        engine.step_seconds(_STEPS_AFTER_A_PAUSE, batch)
        return 1000 * engine.step_seconds(max(1, self._args.steps // self._args.turns), batch)

    def _turns(
        self,
        measure: Callable[[Engine], float],
        engines: Mapping[str, Engine] | None = None,
    ) -> dict[str, list[float]]:
        def alone(engine: Engine) -> float:
            others = [other for other in self._engines.values() if other is not engine]
            for other in others:
                other.pause()
            try:
                return measure(engine)
            finally:
                for other in others:
                    other.resume()

        return in_turns(engines or self._engines, alone, self._args.turns)

    def _running(
        self,
        context: int,
        batch: int,
        engines: Mapping[str, Engine],
        measure: Callable[[Engine], float],
    ) -> dict[str, list[float]]:
        """Measure engines that have so many requests in decode."""
        # With random weights a step takes the same time whatever the keys are.
        attend = context <= self._args.attend_to
        running = {name: engine.start(context, batch, attend) for name, engine in engines.items()}
        values = self._turns(measure, engines)
        for name, engine in engines.items():
            engine.stop(running[name])
        return values

    def _decode(
        self, context: int, batch: int, engines: Mapping[str, Engine]
    ) -> dict[str, list[float]]:
        return self._running(context, batch, engines, lambda e: self._step_ms(e, batch))

    def _reach(self) -> int:
        return self._args.sink_tokens + self._args.window_tokens

    def _decode_ideals(self, cell: Cell, base: float) -> dict[str, float]:
        if cell.context <= self._reach():
            return dict.fromkeys(self._shares, base)
        if cell.batch not in self._shortest:
            engines = {BASELINE: self._engines[BASELINE]}
            found = self._decode(self._reach(), cell.batch, engines)
            self._shortest[cell.batch] = statistics.median(found[BASELINE])
        shortest = self._shortest[cell.batch]
        return {name: decode_ideal(base, shortest, f) for name, f in self._shares.items()}

    def _prefill_ideals(self, cell: Cell, base: float) -> dict[str, float]:
        """Hold long prompts against what their attention would save; see `serve_cases`."""
        if cell.context < self._args.profile_from or "static" not in self._engines:
            return {}
        static = self._engines["static"]
        full = kernel_row("", cell.context, self._engines[BASELINE].profile(cell.context))
        static.fix_routes(self._shape.spread(1.0))
        window = kernel_row("", cell.context, static.profile(cell.context))
        static.fix_routes(self._shape.spread(self._args.share))
        saved = full["attention_ms"] - window["attention_ms"]
        return {name: base - share * saved for name, share in self._shares.items()}

    def _host_times(self, batch: int) -> None:
        """Print the host time of a decode step's functions, and keep it."""
        for name, engine in self._engines.items():
            running = engine.start(512, batch)
            engine.call_worker("begin_host_times")
            engine.step_seconds(_HOST_STEPS, batch)
            times = engine.call_worker("end_host_times")
            engine.stop(running)
            micros = {what: 1e6 * s / _HOST_STEPS for what, (_, s) in times.items()}
            whole = sum(us for what, us in micros.items() if what.startswith("GPUModelRunner."))
            row = {
                "shape": self._args.model.name,
                "what": "host_us",
                "policy": name,
                "context": 512,
                "batch": batch,
                "runner": whole,
                "functions": micros,
            }
            parts = ", ".join(f"{what} {us:.0f}" for what, us in micros.items())
            self._rows.keep(("host", name, batch), row, f"host us, {batch} rows, {name}: {parts}")

    def _print_kernels(self, context: int) -> None:
        for name, engine in self._engines.items():
            for what, kernels in (
                (f"a prompt of {context} tokens", engine.profile(context)),
                ("16 decode steps", self._decode_kernels(engine, context)),
            ):
                say(f"{name}, {what}: {sum(ms for *_, ms in kernels):.3f} ms of kernels")
                for kernel, calls, ms in kernels[:_PRINTED_KERNELS]:
                    say(f"  {ms:9.3f} ms {calls:6d} x  {kernel[:90]}")

    def _decode_kernels(self, engine: Engine, context: int) -> list[tuple[str, int, float]]:
        running = engine.start(context, 1)
        kernels = engine.profile_steps(16, 1)
        engine.stop(running)
        return kernels


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--load-format", default="auto", help="`dummy` for random weights (default auto)")
    add("--baseline", default=BASELINE, help="vLLM's own backend (CPU_ATTN on a CPU)")
    add("--policies", nargs="+", choices=("full", "static", "router"),
        default=["full", "static", "router"])  # fmt: skip
    add("--share", type=float, default=0.75, help="of SPARSE layers (default 0.75)")
    add("--cells", nargs="+", default=_CELLS, metavar="WHAT:CONTEXT[xBATCH[+PROMPT]]",
        help="decode:1024x16, ttft:4000, mixed:8192x16+4096; measured in this order")  # fmt: skip
    add("--first-mixed", action="store_true", help="time the first mixed batches, before all else")
    add("--host", nargs="+", type=int, default=[], help="rows of steps whose host time is told")
    add("--profile", nargs="+", type=int, default=[], help="tokens of prompts: print the kernels")
    add("--profile-from", type=int, default=16_000,
        help="longer prompts are held against the ideal (default 16000)")  # fmt: skip
    add("--turns", type=int, default=7, help="that count (default 7)")
    add("--steps", type=int, default=200, help="decode steps, all turns together (default 200)")
    add("--prompts", type=int, default=3, help="prompts a turn, the median counts (default 3)")
    add("--attend-to", type=int, default=2048,
        help="longer prompts of decode cells are not attended (default 2048)")  # fmt: skip
    add("--sink-tokens", type=int, default=128)
    add("--window-tokens", type=int, default=2048)
    add("--max-model-len", type=int, default=32768)
    add("--kv-gib", type=float, default=4, help="KV cache of each engine, GiB (default 4)")
    add("--gpu-memory-utilization", type=float, default=0.1)
    add("--dtype", default="bfloat16")
    add("--engine-arguments", type=json.loads, default={},
        help='of all engines, JSON, as {"kv_cache_dtype": "fp8"}')  # fmt: skip
    add("--seconds", type=float, help="begin no cell after so many seconds")
    args = parser.parse_args()
    args.cells = [_cell(text) for text in args.cells]
    return args


def _cell(text: str) -> Cell:
    what, _, rest = text.partition(":")
    return Cell.read(f"{what}_ms", rest)


if __name__ == "__main__":
    sys.exit(main())
