"""Requests held at once and tokens a second: KV blocks of SPARSE layers given back, or kept.

    python -m benchmarks.bench_free_kv --model MODEL --out ROWS.json --kv-gib 100
    python -m benchmarks.bench_free_kv --table kv_freed.json ROWS.json ...

Engines with KV caches of one size answer the same queue, one after another: `vllm` (its own
backend), `flux` (a share of the layers SPARSE, every key kept), `free_kv` (the same layers, freed)
and `router` (a router that makes the same layers SPARSE for every request, which the scheduler
learns of with each request's first step). The second form writes a row for each engine that frees,
beside vLLM's in the same memory.

An engine's time is its start (65 to 75 s with 8B's shape on an H200, half of them vLLM's compiling
and its graphs), filling the memory, and a generation of requests. FLASH_ATTN took 130 s in all with
prompts of 32K; 582 s were too few for three engines with prompts of 64K. A run that has too little
time left ends with an error; rows of engines before it are kept.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_process import Engine
from benchmarks.row_file import RowFile, say
from benchmarks.serve_cases import K, Shape
from flux_vllm.kv.groups import cluster_by_route, cluster_layers
from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route

TILE_TOKENS = 128
"""Kept before a window, as docs/KV_MEMORY.md says."""
ENGINES = ("vllm", "flux", "free_kv", "router")
_LEAST_SECONDS = 20.0
"""Less is not begun with."""
_CERTAIN = 20.0
"""A logit that leaves no doubt."""


def main() -> None:
    """Run every engine under the load and write its row, or write the table of such rows.

    Raises: RuntimeError: time was over before all engines were measured.
    """
    args = _parse()
    if args.table is not None:
        table(args.rows, args.table)
        return
    end = time.monotonic() + args.seconds
    rows = RowFile(args.out)
    shape = Shape.read(args.model)
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(args.engines):
            share, engine_arguments = variant(args, shape, name, Path(folder))
            begin = time.monotonic()
            with Engine(shape.vocab_size, **engine_arguments) as engine:
                engine.prefill_seconds(args.context)  # what compiles does so before it is timed
                left = end - time.monotonic()
                say(f"{name}: started in {time.monotonic() - begin:.0f} s, {left:.0f} s are left")
                if left < _LEAST_SECONDS:
                    raise RuntimeError(
                        f"--seconds: expected at least {_LEAST_SECONDS:.0f} s after the start of "
                        f"{name}, found {left:.0f}; not measured: "
                        f"{', '.join(args.engines[number:])}; give more, or fewer --engines"
                    )
                found = engine.answer_queue(args.context, args.tokens, left)
                settings = engine.settings()
            row = {
                "metric": "free_kv",
                "shape": args.model.name,
                "engine": name,
                "sparse_share": share,
                "pattern": args.pattern,
                "context": args.context,
                "tokens": args.tokens,
                "kv_gib": args.kv_gib,
                "expected_held": expected_held(args, shape, name, share),
                **found,
                "settings": settings,
            }
            rows.keep(name, row, describe(row))


def describe(row: dict[str, Any]) -> str:
    """Write a row as a line."""
    return (
        f"{row['engine']:8s} {row['context']} tokens, f = {row['sparse_share']:.2f}: "
        f"{row['most_running']} requests at once (formula {row['expected_held']:.1f}, mean "
        f"{row['mean_running']:.1f}), {row['tokens_per_second']:.1f} tokens/s over "
        f"{row['generations']:.2f} generations ({row['seconds']:.0f} s), decode "
        f"{row['decode_tokens_per_second']:.1f} tokens/s at {row['decode_step_ms']:.2f} ms a step, "
        f"{row['preemptions']} preemptions, full after {row['fill_seconds']:.0f} s"
    )


def variant(
    args: argparse.Namespace, shape: Shape, name: str, folder: Path
) -> tuple[float, dict[str, Any]]:
    """Return an engine's share of groups (`flux`: layers) that are SPARSE, and its arguments."""
    arguments = {
        "model": str(args.model),
        "max_model_len": args.context + args.tokens,
        "block_size": args.block_size,
        "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
        **args.engine_arguments,
    }
    if name == "vllm":
        return 0.0, arguments | {"attention_backend": args.baseline}
    layers = shape.spread(args.share)
    sizes = {"sink_tokens": args.sink, "window_tokens": args.window}
    flux: dict[str, Any] = {"sparse_pattern": args.pattern, "free_kv": name != "flux"}
    share = len(layers) / shape.layers
    if name == "router":
        flux["router"] = str(write_fixed_router(shape, folder, layers, **sizes))
        order = [*layers, *sorted(set(range(shape.layers)) - set(layers))]
        routed = cluster_by_route(order, ()).sparse
        share = sum(set(cluster) <= set(layers) for cluster in routed) / len(routed)
    else:
        flux |= {"policy": "static", "sparse_layers": layers, **sizes}
        if name == "free_kv":
            clusters = cluster_layers(range(shape.layers), layers)
            share = len(clusters.sparse) / clusters.num_groups
    return share, arguments | {
        "attention_backend": "flux",
        "additional_config": {"flux": flux},
    }


def write_fixed_router(
    shape: Shape, folder: Path, sparse_layers: Sequence[int], sink_tokens: int, window_tokens: int
) -> Path:
    """Write a router that makes the same layers SPARSE for every request, and return its path."""
    others = [layer for layer in range(shape.layers) if layer not in sparse_layers]
    info = RouterInfo(
        base_model="",
        num_layers=shape.layers,
        head_dim=shape.head_dim,
        pool_tokens=96,
        sink_tokens=sink_tokens,
        window_tokens=window_tokens,
        freeing_order=(*sparse_layers, *others),
    )
    router = info.make_router().requires_grad_(False)
    _, bias = router.linear("head.4")
    _last_weight(router).zero_()
    bias.zero_()
    bias[list(sparse_layers), int(Route.SPARSE)] = _CERTAIN
    bias[others, int(Route.FULL)] = _CERTAIN
    return write_router(folder, router, info)


def _last_weight(router: LayerRouter) -> torch.Tensor:
    return router.linear("head.4")[0]


def expected_held(args: argparse.Namespace, shape: Shape, name: str, share: float) -> float:
    """Return how many requests fit at once, all of them at their full length, by the formula.

    Args:
        args: sizes of load and KV cache.
        shape: of the model, in 16 bits.
        name: of the engine.
        share: of the groups that are SPARSE.
    """
    tokens = args.context + args.tokens
    token_nbytes = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
    kept = args.sink + args.window + max(args.block_size, TILE_TOKENS) + 2 * args.block_size
    freed = share if name in ("free_kv", "router") else 0.0
    part = 1 - freed + freed * min(1.0, kept / tokens)
    memory, request = args.kv_gib * 2**30, tokens * token_nbytes
    if name == "router":  # the last one is admitted as if it were FULL
        return (memory - args.context * token_nbytes) / (request * part) + 1
    return memory / (request * part)


def table(files: Sequence[Path], out: Path) -> None:
    """Write the rows of engines that free beside those of vLLM in the same memory."""
    rows = [row for file in files for row in json.loads(file.read_text())]
    load = ("shape", "context", "tokens", "kv_gib")
    base = {tuple(r[key] for key in load): r for r in rows if r["engine"] == "vllm"}
    written = []
    for row in rows:
        other = base.get(tuple(row[key] for key in load))
        if other is None or row["engine"] not in ("free_kv", "router"):
            continue
        written.append(
            {
                **{key: row[key] for key in (*load, "engine", "pattern", "sparse_share")},
                "requests": row["most_running"],
                "requests_flash_attn": other["most_running"],
                "requests_expected": row["expected_held"],
                "tokens_s": row["tokens_per_second"],
                "tokens_s_flash_attn": other["tokens_per_second"],
                "decode_tokens_s": row["decode_tokens_per_second"],
                "decode_tokens_s_flash_attn": other["decode_tokens_per_second"],
                "decode_step_ms": row["decode_step_ms"],
                "decode_step_ms_flash_attn": other["decode_step_ms"],
                "generations": [row["generations"], other["generations"]],
                "preemptions": [row["preemptions"], other["preemptions"]],
                "provenance": row["provenance"],
                "provenance_flash_attn": other["provenance"],
            }
        )
        say(
            f"{row['engine']:8s} {row['context']} tokens: {row['most_running']} requests, "
            f"{row['most_running'] / other['most_running']:.2f}x; tokens/s "
            f"{row['tokens_per_second'] / max(other['tokens_per_second'], 1e-9):.2f}x; decode "
            f"{row['decode_tokens_per_second'] / max(other['decode_tokens_per_second'], 1e-9):.2f}x"
        )
    # The rows' own provenance, not that of this table.
    out.write_text(json.dumps(written, indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("rows", type=Path, nargs="*", help="with --table: files of rows")
    add("--table", type=Path, help="write the table of these rows, and run nothing")
    add("--model", type=Path, help="folder with config.json (and weights)")
    add("--out", type=Path, help="JSON file for the rows")
    add("--kv-gib", type=float, help="KV cache of each engine")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="in this order")
    add("--baseline", default="FLASH_ATTN", help="vLLM's own backend (default FLASH_ATTN)")
    add("--share", type=float, default=0.75, help="of SPARSE layers (default 0.75)")
    add("--pattern", default="streaming", help="sparse pattern (default streaming)")
    add("--context", type=int, default=64 * K, help="tokens of a prompt (default 65536)")
    add("--tokens", type=int, default=1024, help="that each request gets (default 1024)")
    add("--seconds", type=float, default=1800.0,
        help="for all engines together, their starts among them (default 1800)")  # fmt: skip
    add("--sink", type=int, default=128, help="sink tokens (default 128)")
    add("--window", type=int, default=2048, help="window tokens (default 2048)")
    add("--block-size", type=int, default=64, help="tokens of a KV block (default 64)")
    add("--engine-arguments", type=json.loads, default={}, help="JSON object for `vllm.LLM`")
    args = parser.parse_args()
    if args.table is None and None in (args.model, args.out, args.kv_gib):
        parser.error("expected --model, --out and --kv-gib, or --table and files of rows")
    return args


if __name__ == "__main__":
    main()
