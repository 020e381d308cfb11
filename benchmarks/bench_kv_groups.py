"""What KV cache groups cost: time a token at an equal batch, and host time a step, by their number.

    python -m benchmarks.bench_kv_groups --model MODEL --out OUT.json [--layers 30]

Three engines with the same layers SPARSE, alive at once, take turns: every key kept (1 group),
static clusters (6 groups for 25 of 30 layers) and routed clusters (10 groups). Their attention
reads the same keys, so what differs is what groups cost.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bench_free_kv import write_fixed_router
from benchmarks.engine_process import Engine
from benchmarks.row_file import RowFile
from benchmarks.serve_cases import K, Shape
from flux_vllm.kv.groups import cluster_by_route, cluster_layers


def main() -> None:
    """Measure in turns and write a row an engine."""
    args = _parse()
    shape = replace(Shape.read(args.model), layers=args.layers)
    sparse = shape.spread(args.share)
    sizes = {"sink_tokens": args.sink, "window_tokens": args.window}
    rows = RowFile(args.out)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        router = write_fixed_router(shape, Path(folder), sparse, **sizes)
        static = {"policy": "static", "sparse_layers": sparse, **sizes}
        configs = {
            1: static,
            cluster_layers(range(args.layers), sparse).num_groups: static | {"free_kv": True},
            cluster_by_route(range(args.layers), ()).num_groups: {
                "router": str(router),
                "free_kv": True,
            },
        }
        engines = {groups: _engine(args, shape, flux) for groups, flux in configs.items()}
        for engine in engines.values():
            stack.enter_context(engine)
        for engine in engines.values():
            engine.wait()
        for context, batch in args.loads:
            for row in measure(args, engines, context, batch):
                times = ", ".join(f"{k} {v:.0f}" for k, v in row["host_us"].items())
                line = (
                    f"{row['groups']:2d} groups, {context} x {batch}: {row['step_ms']:.3f} ms a "
                    f"step ({row['against_one_group']:+.2%}); host, us a step: {times}"
                )
                rows.keep((row["groups"], context, batch), row, line)


def measure(
    args: argparse.Namespace, engines: dict[int, Engine], context: int, batch: int
) -> list[dict[str, Any]]:
    """Time all engines at one load, turn by turn. Returns: a row an engine."""
    running = {
        groups: engine.start(context, batch, attend=False) for groups, engine in engines.items()
    }
    turns: dict[int, list[float]] = {groups: [] for groups in engines}
    for turn in range(args.turns):
        for groups in sorted(engines, reverse=bool(turn % 2)):
            turns[groups].append(1000 * engines[groups].step_seconds(args.steps, batch))
    host = {groups: engine.host_times(args.steps, batch) for groups, engine in engines.items()}
    for groups, engine in engines.items():
        engine.stop(running[groups])
    return [
        {
            "metric": "kv_groups",
            "shape": args.model.name,
            "layers": args.layers,
            "groups": groups,
            "context": context,
            "batch": batch,
            "step_ms": statistics.median(values),
            "against_one_group": statistics.median(
                value / one - 1 for value, one in zip(values, turns[1], strict=True)
            ),
            "values": values,
            "host_us": host[groups],
        }
        for groups, values in turns.items()
    ]


def _engine(args: argparse.Namespace, shape: Shape, flux: dict[str, Any]) -> Engine:
    return Engine(
        shape.vocab_size,
        model=str(args.model),
        hf_overrides={"num_hidden_layers": args.layers},
        max_model_len=max(context for context, _ in args.loads) + 4352,
        block_size=64,
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        worker_extension_cls="benchmarks.host_times.TimedWorker",
        attention_backend="flux",
        additional_config={"flux": {"sparse_pattern": "streaming"} | flux},
        **args.engine_arguments,
    )


def _load(text: str) -> tuple[int, int]:
    context, batch = text.split("x")
    return int(context), int(batch)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])  # type: ignore[union-attr]
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--layers", type=int, default=30, help="of the model, cut to so many (default 30)")
    add("--share", type=float, default=25 / 30, help="of SPARSE layers (default 25 of 30)")
    add("--loads", type=_load, nargs="+", default=[(32 * K, 4), (K, 64)], help="CONTEXTxBATCH")
    add("--turns", type=int, default=6, help="default 6")
    add("--steps", type=int, default=64, help="of a turn (default 64)")
    add("--kv-gib", type=float, default=18.0, help="KV cache of each engine (default 18)")
    add("--sink", type=int, default=128, help="sink tokens (default 128)")
    add("--window", type=int, default=2048, help="window tokens (default 2048)")
    add("--engine-arguments", type=json.loads, default={}, help="JSON object for `vllm.LLM`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
