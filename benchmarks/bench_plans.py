"""Time decode calls of FlashAttention-3 under its own work plan and under flux's, on one GPU.

    python -m benchmarks.bench_plans --out OUT.json

Batches of FULL and SPARSE rows, by head counts. Times are of CUDA graphs of calls that go around
several KV caches, so that none is found in the L2 cache; in turns, medians.
"""

import argparse
import math
import random
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.row_file import RowFile
from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.decode_plan import (
    CallShape,
    plan_width,
    write_decode_plans,
)
from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows

BLOCK_SIZE, SPLITS, SPARSE_KEYS = 16, 32, 2176
SHAPES = [(32, 8, 128), (8, 2, 128), (9, 3, 64)]
_K = 1024


def cases() -> dict[str, list[int]]:
    """Return the keys of each row, by name; in `FULL last` batches SPARSE rows come first."""
    found = {}
    for rows, length, full_rows in (
        (4, 64, (4, 3, 2, 1, 0)),
        (4, 32, (2, 1)),
        (4, 128, (2, 1)),
        (16, 16, (16, 12, 8, 4)),
    ):
        for full in full_rows:
            name = f"{rows} x {length}K, {full} FULL last"
            found[name] = [SPARSE_KEYS] * (rows - full) + [length * _K] * full
    for rows, length, full in ((4, 64, 2), (16, 16, 8), (32, 8, 16), (64, 4, 32), (64, 16, 16)):
        keys = [SPARSE_KEYS] * (rows - full) + [length * _K] * full
        random.Random(1).shuffle(keys)
        found[f"{rows} x {length}K, {full} FULL, shuffled"] = keys
    for length in (2, 8, 32, 128):
        found[f"1 x {length}K"] = [length * _K]
    for rows, seed in ((6, 1), (12, 2), (24, 3), (48, 4)):
        draw = random.Random(seed)
        found[f"{rows} rows, half SPARSE, others 2K to 64K"] = [
            int(2 ** draw.uniform(11, 16)) if draw.random() < 0.5 else SPARSE_KEYS
            for _ in range(rows)
        ]
    return found


class Batch(NamedTuple):
    """One query a row over `caches` of the same blocks."""

    keys: list[int]
    shape: CallShape
    query: torch.Tensor
    out: torch.Tensor
    caches: list[tuple[torch.Tensor, ...]]
    table: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor

    def attend(self, cache: int, plan: torch.Tensor | None) -> None:
        """Attend over one of the caches."""
        fa3.attend(
            self.query,
            KVCache(*self.caches[cache]),
            self.out,
            PagedRows(self.table, None, self.starts, self.lens),
            max_query_len=1,
            max_seq_len=max(self.keys),
            scale=self.shape.head_dim**-0.5,
            scheduler_metadata=plan,
            num_splits=SPLITS,
        )


def make_batch(keys: list[int], shape: CallShape) -> Batch:
    """Draw queries and KV caches: two or more, of 200 MB together where rows are short."""
    rows, blocks = len(keys), [-(-n // BLOCK_SIZE) for n in keys]
    nbytes = 4 * sum(keys) * shape.kv_heads * shape.head_dim
    count = max(2, min(12, math.ceil(2e8 / nbytes)))
    packed = (1 + sum(blocks), BLOCK_SIZE, shape.kv_heads, 2 * shape.head_dim)
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    order = iter((1 + torch.randperm(sum(blocks))).tolist())
    table = torch.zeros(rows, max(blocks), dtype=torch.int32)
    for row, width in enumerate(blocks):
        table[row, :width] = torch.tensor([next(order) for _ in range(width)])
    query = torch.randn(rows, shape.heads, shape.head_dim, **half)
    return Batch(
        keys,
        shape,
        query,
        torch.empty_like(query),
        [torch.randn(packed, **half).split(shape.head_dim, -1) for _ in range(count)],
        table.cuda(),
        torch.arange(rows + 1, dtype=torch.int32, device="cuda"),
        torch.tensor(keys, dtype=torch.int32, device="cuda"),
    )


def fa3s_plan(batch: Batch) -> torch.Tensor:
    """Return the plan that FA3 makes for itself."""
    from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

    shape = batch.shape
    return get_scheduler_metadata(
        len(batch.keys),
        1,
        max(batch.keys),
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        batch.lens,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=batch.starts,
        page_size=BLOCK_SIZE,
        causal=True,
        num_splits=SPLITS,
    )


def flux_plan(batch: Batch) -> torch.Tensor:
    """Return flux's plan."""
    rows = len(batch.keys)
    plans = torch.zeros(1, plan_width(rows), dtype=torch.int32, device="cuda")
    found = write_decode_plans(
        batch.lens[None], batch.starts, plans, batch.shape, max_query_len=1, num_splits=SPLITS
    )
    assert found is not None, "a shape that flux leaves to FA3"
    return found[0]


def measure(batch: Batch, plans: dict[str, torch.Tensor | None], turns: int) -> dict[str, Any]:
    """Return microseconds a call by plan: median, least, greatest."""
    graphs, expected = {}, None
    for name, plan in plans.items():
        batch.out.fill_(float("nan"))
        batch.attend(0, plan)
        expected = batch.out.float() if expected is None else expected
        torch.testing.assert_close(batch.out.float(), expected, atol=2e-2, rtol=0)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for cache in range(len(batch.caches)):
                batch.attend(cache, plan)
    times: dict[str, list[float]] = {name: [] for name in plans}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(turns + 2):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:  # the first ones warm up
                times[name].append(begin.elapsed_time(end) * 1000 / len(batch.caches))
    return {
        name: {"us": statistics.median(values), "least": min(values), "greatest": max(values)}
        for name, values in times.items()
    }


def splits_in(plan: torch.Tensor, rows: int) -> list[int]:
    """Read the rows' shares out of a plan."""
    begin = -(-rows // 4) * 4
    return plan[begin : begin + rows].tolist()


def main() -> None:
    """Measure each batch, print a line and keep a row of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the rows")
    parser.add_argument("--turns", type=int, default=15, help="timed turns a batch (default 15)")
    args = parser.parse_args()
    assert fa3.is_available(), "needs a Hopper GPU and vLLM"
    torch.manual_seed(0)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rows = RowFile(args.out)
    for heads in SHAPES:
        shape = CallShape(*heads, sms)
        for name, keys in cases().items():
            rows.keep((heads, name), *_row(name, make_batch(keys, shape), args.turns))


def _row(name: str, batch: Batch, turns: int) -> tuple[dict[str, Any], str]:
    """Measure a batch. Returns: its row, and a line about it."""
    own, flux = fa3s_plan(batch), flux_plan(batch)
    times = measure(batch, {"fa3_in_call": None, "fa3": own, "flux": flux}, turns)
    shape, us = batch.shape, {plan: found["us"] for plan, found in times.items()}
    line = (
        f"{shape.heads}/{shape.kv_heads} x {shape.head_dim}, {name:38s} FA3 in call "
        f"{us['fa3_in_call']:7.1f} us, FA3 {us['fa3']:7.1f}, flux {us['flux']:7.1f}  "
        f"{us['fa3'] / us['flux']:.3f}x of FA3"
    )
    count = len(batch.keys)
    row = {
        "case": name,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "keys": batch.keys,
        "kv_bytes": 4 * sum(batch.keys) * shape.kv_heads * shape.head_dim,
        "us": times,
        "splits": {"fa3": splits_in(own, count), "flux": splits_in(flux, count)},
    }
    return row, line


if __name__ == "__main__":
    main()
