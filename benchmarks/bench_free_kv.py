"""Requests held at once and tokens a second: KV blocks of SPARSE layers given back, or kept.

    python -m benchmarks.bench_free_kv --model MODEL --out OUT.json --kv-gib 100

Each engine answers the same load, more requests than fit: vLLM's own backend, flux with the same
layers SPARSE but every key kept, and flux with `free_kv`. Engines run one after another with KV
caches of one size. A row has the most requests that ran at once, what the formula of
docs/KV_MEMORY.md expects, the tokens a second of the whole load, and those of the steps in which at
least nine tenths of the most rows decoded.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engine_process import Engine
from benchmarks.row_file import RowFile
from benchmarks.serve_cases import K, Shape
from flux_vllm.kv.groups import cluster_layers

TILE_TOKENS = 128
"""Kept before a window, as docs/KV_MEMORY.md says."""


def main() -> None:
    """Run every engine under the load and write its row."""
    args = _parse()
    rows = RowFile(args.out)
    shape = Shape.of(json.loads((args.model / "config.json").read_text()))
    for name, share, engine_arguments in variants(args, shape):
        with Engine(shape.vocab_size, **engine_arguments) as engine:
            engine.prefill_seconds(args.context)  # what compiles does so before it is timed
            found = engine.answer_load(args.context, args.requests, args.tokens)
            settings = engine.settings()
        expected = expected_held(args, shape, share if name == "free_kv" else 0.0)
        row = {
            "metric": "free_kv",
            "engine": name,
            "sparse_share": share,
            "pattern": args.pattern,
            "context": args.context,
            "requests": args.requests,
            "tokens": args.tokens,
            "expected_held": expected,
            **found,
            "settings": settings,
        }
        line = (
            f"{name:9s} f = {share:4.2f}: {found['most_running']} requests at once (formula "
            f"{expected:.1f}), {found['tokens_per_second']:.1f} tokens/s, "
            f"{found['tokens_per_second_at_most']:.1f} in decode of the most rows"
        )
        rows.keep((name, share), row, line)


def variants(args: argparse.Namespace, shape: Shape) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Yield each engine's name, share of SPARSE layers, and arguments of `vllm.LLM`."""
    common = {
        "model": str(args.model),
        "max_model_len": args.context + args.tokens,
        "block_size": args.block_size,
        "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
        **args.engine_arguments,
    }
    yield "vllm", 0.0, common | {"attention_backend": args.baseline}
    for share in args.shares:
        layers = shape.spread(share)
        flux = {
            "policy": "static",
            "sparse_layers": layers,
            "sink_tokens": args.sink,
            "window_tokens": args.window,
            "sparse_pattern": args.pattern,
        }
        freed = cluster_layers(range(shape.layers), layers).freed_share
        for name, free_kv in (("flux", False), ("free_kv", True)):
            config = {"flux": flux | {"free_kv": free_kv}}
            yield (
                name,
                freed if free_kv else len(layers) / shape.layers,
                common | {"attention_backend": "flux", "additional_config": config},
            )


def expected_held(args: argparse.Namespace, shape: Shape, freed_share: float) -> float:
    """Return how many requests fit at once, all of them at their full length, by the formula.

    Args:
        args: sizes of load and KV cache.
        shape: of the model, in 16 bits.
        freed_share: of the KV cache groups.
    """
    tokens = args.context + args.tokens
    token_nbytes = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim
    kept = args.sink + args.window + max(args.block_size, TILE_TOKENS) + 2 * args.block_size
    share = 1 - freed_share + freed_share * min(1.0, kept / tokens)
    return args.kv_gib * 2**30 / (tokens * token_nbytes * share)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])  # type: ignore[union-attr]
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--kv-gib", type=float, required=True, help="KV cache of each engine")
    add("--baseline", default="FLASH_ATTN", help="vLLM's own backend (default FLASH_ATTN)")
    add("--shares", type=float, nargs="+", default=[0.5, 0.75], help="of SPARSE layers")
    add("--pattern", default="streaming", help="sparse pattern (default streaming)")
    add("--context", type=int, default=64 * K, help="tokens of a prompt (default 65536)")
    add("--requests", type=int, default=64, help="of the load (default 64)")
    add("--tokens", type=int, default=512, help="that each request gets (default 512)")
    add("--sink", type=int, default=128, help="sink tokens (default 128)")
    add("--window", type=int, default=2048, help="window tokens (default 2048)")
    add("--block-size", type=int, default=64, help="tokens of a KV block (default 64)")
    add("--engine-arguments", type=json.loads, default={}, help="JSON object for `vllm.LLM`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
