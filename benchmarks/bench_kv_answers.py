"""A real model's answers with KV blocks given back, beside those with every key kept.

    python -m benchmarks.bench_kv_answers --model MODEL --router ROUTER --kv-gib 4 --out OUT.json \
        --prompts longbench_dev.jsonl [--soak 2000]

All prompts are there from the beginning and the KV cache is too small for them. Three engines
answer in turn: `kept`; `kept_2x`, with twice the memory, so that other requests share its steps
(what 16 bits make of that is the measure of what two runs differ by); and `freed`. The order in
which layers are freed comes from the routes that `kept` gave out. Then mixed requests, some of them
aborted, end with every block free.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.engine_process import Engine
from benchmarks.real_tasks.samples import Encoder, read_samples
from benchmarks.row_file import RowFile
from flux_vllm.router.checkpoint import read_router, write_router
from flux_vllm.router.route import Route


def main() -> None:
    """Answer with each engine and write its row."""
    args = _parse()
    prompts, stop_ids = _prompts(args)
    rows = RowFile(args.out)
    flux = flux_config(args)
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kept", "kept_2x", "freed"):
            if name == "freed":
                order = freeing_order(kept["routes"])
                flux |= {"free_kv": True, "router": str(_ordered(args.router, order, folder))}
            gib = args.kv_gib * (2 if name == "kept_2x" else 1)
            with _engine(args, flux, gib) as engine:
                found = engine.answer_prompts(prompts, args.tokens, stop_ids)
                if name == "freed" and args.soak:
                    found["soak"] = left = engine.soak(prompts, args.soak, seed=0)
                    if left["free_blocks"] != left["blocks"]:
                        raise RuntimeError(
                            f"expected every block free after the soak, found {left}"
                        )
            kept = kept or found
            row = {
                "metric": "kv_answers",
                "model": args.model.name,
                "engine": name,
                "pattern": args.pattern,
                "full_decode_tokens": args.full_decode_tokens,
                "threshold": args.threshold,
                "kv_gib": gib,
                "prompts": len(prompts),
                "prompt_tokens": sum(map(len, prompts)),
                "sparse_share": sparse_share(found["routes"]),
                **compare(found["tokens"], kept["tokens"]),
                **{k: v for k, v in found.items() if k not in ("tokens", "routes")},
            }
            rows.keep(name, row, describe(row))


def flux_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return what all three engines have in common."""
    return {
        "router": str(args.router),
        "threshold": args.threshold,
        "sparse_pattern": args.pattern,
        "full_decode_tokens": args.full_decode_tokens,
    }


def describe(row: dict[str, Any]) -> str:
    """Write a row as a line."""
    return (
        f"{row['engine']:8s} {row['kv_gib']:g} GiB: {row['most_running']} at once, mean "
        f"{row['mean_running']:.1f}, {row['preemptions']} preemptions, {row['seconds']:.0f} s; "
        f"answers equal to kept's {row['equal_answers']:.3f}, prefixes {row['equal_prefix']:.3f}; "
        f"soak {row.get('soak')}"
    )


def freeing_order(routes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Order layers by how many requests route them FULL, the fewest first: routes [R, layers]."""
    full = Counter(i for row in routes for i, route in enumerate(row) if route != Route.SPARSE)
    return tuple(sorted(range(len(routes[0])), key=lambda layer: (full[layer], layer)))


def sparse_share(routes: Sequence[Sequence[int]]) -> float:
    """Return the share of SPARSE among all decisions."""
    values = [route for row in routes for route in row]
    return values.count(int(Route.SPARSE)) / max(len(values), 1)


def compare(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the share of equal answers, and the mean share of an answer before it parts."""
    equal = prefix = 0.0
    for one, other in zip(found, expected, strict=True):
        same = [a == b for a, b in zip(one, other, strict=False)]
        until = same.index(False) if False in same else len(same)
        equal += list(one) == list(other)
        prefix += until / max(len(one), len(other), 1)
    count = max(len(found), 1)
    return {"equal_answers": equal / count, "equal_prefix": prefix / count}


def _ordered(router: Path, order: tuple[int, ...], folder: str) -> Path:
    """Write a copy of a router that says in which order layers are freed."""
    weights, info = read_router(router)
    return write_router(Path(folder), weights, replace(info, freeing_order=order))


def _prompts(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoder = Encoder(tokenizer, args.max_model_len)
    samples = [replace(s, max_new_tokens=args.tokens) for s in read_samples(args.prompts)]
    prompts = [encoder.encode(sample).token_ids for sample in samples]
    longest = sorted(prompts, key=len, reverse=True)
    return longest[: args.most] if args.most else prompts, [tokenizer.eos_token_id]


def _engine(args: argparse.Namespace, flux: dict[str, Any], gib: float) -> Engine:
    vocab_size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    return Engine(
        vocab_size,
        model=str(args.model),
        max_model_len=args.max_model_len,
        block_size=args.block_size,
        kv_cache_memory_bytes=int(gib * 2**30),
        attention_backend="flux",
        additional_config={"flux": flux},
        **args.engine_arguments,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])  # type: ignore[union-attr]
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder in the hub's format")
    add("--router", type=Path, required=True, help="its router")
    add("--prompts", type=Path, required=True, help="JSON Lines, as benchmarks.real_tasks reads")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--kv-gib", type=float, required=True, help="KV cache of `kept` and `freed`")
    add("--most", type=int, default=0, help="take so many of the longest prompts (0: all)")
    add("--tokens", type=int, default=128, help="most tokens of an answer (default 128)")
    add("--threshold", type=float, default=0.5, help="of the router (default 0.5)")
    add("--pattern", help="sparse pattern (default the router's)")
    add("--full-decode-tokens", type=int, help="of an answer (default the router's)")
    add("--soak", type=int, default=0, help="mixed requests afterwards (default 0)")
    add("--max-model-len", type=int, default=32768, help="default 32768")
    add("--block-size", type=int, default=64, help="tokens of a KV block (default 64)")
    add("--engine-arguments", type=json.loads, default={}, help="JSON object for `vllm.LLM`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
