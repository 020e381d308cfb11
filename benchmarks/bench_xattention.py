"""Time XAttention's three kernels at the Llama-3.1-8B shape beside FlashAttention-3, on one GPU.

    python -m benchmarks.bench_xattention --out FILE.json [--sweep]

Attention is timed over lists of key blocks drawn at random for a given density, since random
queries and keys would keep nearly everything. `floor_us` is FlashAttention-3's time for FULL
attention, times the share of query-key pairs that the lists keep: what they take at its rate.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_attention import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    SCALE,
    SINK,
    WINDOW,
    Batch,
    record,
    write_rows,
)
from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.block_choice import choose_blocks
from flux_vllm.attention_backend.kernels.block_sparse import SparseTile, attend_blocks
from flux_vllm.attention_backend.kernels.block_tasks import BLOCK_TOKENS, pack_block_tasks
from flux_vllm.attention_backend.kernels.strided_scores import score_blocks, tasks_a_program

STRIDE, THRESHOLD = 16, 0.9
CHUNK = 8192
LENGTHS = (32_768, 65_536, 131_072)
DENSITIES = (0.05, 0.1, 0.2, 0.4)
# (keys at a time, warps, stages)
TILES = [(64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (64, 8, 4), (128, 8, 2), (128, 8, 3)]


class Lists:
    """The kernels' buffers for one chunk that ends a prompt of `length` tokens."""

    def __init__(self, length: int) -> None:
        one = [np.array([n]) for n in (length - CHUNK, CHUNK)]
        group = tasks_a_program(HEADS // KV_HEADS, 2, STRIDE)
        self.packed = pack_block_tasks(*one, np.array([True]), group)
        entries, rows = self.packed.num_entries, BLOCK_TOKENS // STRIDE
        self.tasks = torch.from_numpy(self.packed.tasks).cuda()
        self.lse = torch.empty(HEADS, entries * rows, device="cuda")
        self.chosen = torch.zeros(HEADS, entries, dtype=torch.int32, device="cuda")
        self.counts = torch.zeros(HEADS, len(self.tasks), dtype=torch.int32, device="cuda")
        self.sizes = {"most_blocks": self.packed.most_blocks}

    def draw(self, density: float) -> float:
        """Fill the lists at random. Returns: the share of query-key pairs that they keep."""
        generator = np.random.default_rng(0)
        chosen = np.zeros(self.chosen.shape, dtype=np.int32)
        counts = np.zeros(self.counts.shape, dtype=np.int32)
        kept = every = 0
        for task, (row, block, entry) in enumerate(self.packed.tasks.tolist()):
            if row < 0:
                continue
            number = max(2, round(density * (block + 1)))
            for head in range(HEADS):
                others = 1 + generator.choice(block - 1, number - 2, replace=False)
                chosen[head, entry : entry + number] = sorted([0, *others, block])
                counts[head, task] = number
            own = (BLOCK_TOKENS + 1) / 2  # keys a query sees of its own block, on average
            kept += (number - 1) * BLOCK_TOKENS + own
            every += block * BLOCK_TOKENS + own
        self.chosen.copy_(torch.from_numpy(chosen))
        self.counts.copy_(torch.from_numpy(counts))
        return kept / every


def bench(length: int, sweep: bool) -> None:
    """Time one layer's prefill of the last chunk."""
    layers = 4
    batch, lists = Batch([CHUNK], [length], layers, prefill=True), Lists(length)
    batch.write_views([0])
    used = torch.full_like(batch.row(3), CHUNK)
    rows = (batch.table, batch.starts, used, batch.lens)
    views = (batch.table2, batch.row(0), batch.starts)
    shape = {"max_query_len": CHUNK, "max_seq_len": length, "scale": SCALE}
    case = f"{CHUNK} at {length // 1024}K"

    def full(layer: int) -> object:
        return fa3.attend(
            batch.query,
            *batch.caches[layer],
            batch.out,
            *views,
            batch.lens,
            seqused_q=used,
            **shape,
        )

    def streaming(layer: int) -> None:
        fa3.attend_sparse_prefill(
            batch.query, *batch.caches[layer], batch.out, *views, used, batch.lens,
            sink_tokens=SINK, window_tokens=WINDOW, **shape,
        )  # fmt: skip

    def score(layer: int) -> None:
        score_blocks(
            batch.query, batch.caches[layer][0], *rows, lists.tasks, lists.lse, scale=SCALE,
            stride=STRIDE, **lists.sizes,
        )  # fmt: skip

    def choose(_: int) -> None:
        choose_blocks(
            lists.lse, lists.tasks, used, batch.lens, lists.chosen, lists.counts,
            threshold=THRESHOLD, stride=STRIDE, **lists.sizes,
        )  # fmt: skip

    def attend(tile: SparseTile | None = None) -> Callable[[int], None]:
        return lambda layer: attend_blocks(
            batch.query, *batch.caches[layer], batch.out, *rows, lists.tasks, lists.chosen,
            lists.counts, scale=SCALE, tile=tile,
        )  # fmt: skip

    full_us = record("fa3 FULL", case, full, layers)
    record("fa3 window + merge_sinks", case, streaming, layers)
    flop = 2 * HEADS * HEAD_DIM * CHUNK * (length - CHUNK / 2) / STRIDE
    record("score_blocks", case, score, layers, tflop=round(flop / 1e12, 3))
    record("choose_blocks", case, choose, layers)
    for density in DENSITIES:
        share = lists.draw(density)
        floor = {"share": round(share, 4), "floor_us": round(full_us * share, 1)}
        what = f"{case}, {density:.0%}"
        record("attend_blocks", what, attend(), layers, **floor)
        for tile in TILES if sweep else ():
            record(f"attend_blocks {tile}", what, attend(SparseTile(*tile)), layers, **floor)


def main() -> None:
    """Run every length and write each row with what it ran on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
    args = parser.parse_args()
    assert fa3.is_available(), "the baseline needs a Hopper GPU and vLLM"
    torch.manual_seed(0)
    try:
        for length in LENGTHS:
            bench(length, args.sweep)
    finally:
        write_rows(args.out)


if __name__ == "__main__":
    main()
