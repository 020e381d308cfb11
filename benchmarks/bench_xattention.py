"""Time XAttention's kernels at the Llama-3.1-8B shape beside FlashAttention-3, on one GPU.

    python -m benchmarks.bench_xattention --out FILE.json [--sweep]

Attention is timed over lists of key blocks drawn at random for a given density, since random
queries and keys would keep nearly everything: by Triton (`attend_blocks`), and by FlashAttention-3
over rows of lists (`block_rows`), as a whole and in its parts. `floor_us` is FlashAttention-3's
time for FULL attention, times the share of query-key pairs that the lists keep: what they take at
its rate; `of_fa3_rate` is the part of that rate reached. `xattention layer` is all that a layer
does: score, choose, attend.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_attention import (
    BLOCK_SIZE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    ROWS,
    SCALE,
    SINK,
    WINDOW,
    Batch,
    record,
    write_rows,
)
from flux_vllm.attention_backend.kernels import block_rows, fa3
from flux_vllm.attention_backend.kernels.block_choice import choose_blocks
from flux_vllm.attention_backend.kernels.block_lists import BlockLists
from flux_vllm.attention_backend.kernels.block_sparse import SparseTile, attend_blocks
from flux_vllm.attention_backend.kernels.block_tasks import BLOCK_TOKENS, pack_block_tasks
from flux_vllm.attention_backend.kernels.head_pages import head_pages
from flux_vllm.attention_backend.kernels.paged import PagedRows
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
        self.scratch = torch.empty_like(self.chosen), torch.empty_like(self.counts)
        """Where timed choices go, which may not change the lists that are attended over."""
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


class RowsOfLists:
    """Attention by FlashAttention-3 over a batch's lists, part by part."""

    def __init__(self, batch: Batch, lists: Lists, used: torch.Tensor) -> None:
        self.batch = batch
        self.lists = BlockLists(
            batch.table, batch.starts, used, batch.lens, lists.tasks, lists.chosen, lists.counts
        )
        self.rows = block_rows.make_block_rows(
            lists.packed.tasks, batch.query, BLOCK_SIZE, **lists.sizes
        )
        self.heads = range(HEADS)
        assert self.rows.heads == HEADS, "the parts are timed in one slice"

    def tables(self, layer: int) -> None:
        """Write tables and lengths."""
        keys, values = self.batch.caches[layer]
        pages = head_pages(keys, values)
        block_rows.write_tables(keys, pages, self.lists, self.rows, self.heads, HEADS)

    def gather(self, _: int) -> None:
        """Copy the queries."""
        block_rows.gather_queries(self.batch.query, self.lists, self.rows, self.heads)

    def call(self, layer: int) -> None:
        """Attend, over what the others wrote."""
        pages = head_pages(*self.batch.caches[layer])
        block_rows.attend_rows(pages, self.rows, self.heads, SCALE)

    def scatter(self, _: int) -> None:
        """Copy the outputs."""
        block_rows.scatter_outputs(self.batch.out, self.lists, self.rows, self.heads)

    def attend(self, layer: int) -> None:
        """Do all of it."""
        caches = (self.batch.query, self.batch.caches[layer], self.batch.out)
        block_rows.attend_block_rows(*caches, self.lists, self.rows, scale=SCALE)


def record_share(
    kernel: str, case: str, fn: Callable[[int], object], layers: int, share: float, floor_us: float
) -> None:
    """Time a kernel that attends to a share of the pairs, beside FlashAttention-3's rate."""
    extra = {"share": round(share, 4), "floor_us": round(floor_us, 1)}
    us = record(kernel, case, fn, layers, **extra)
    if us is not None:
        ROWS[-1]["of_fa3_rate"] = round(floor_us / us, 3)
        print(f"{'':69s} {floor_us / us:10.1%} of FlashAttention-3's rate")


def bench(length: int, sweep: bool, write: Callable[[], None]) -> None:
    """Time one layer's prefill of the last chunk."""
    layers = 4
    batch, lists = Batch([CHUNK], [length], layers, prefill=True), Lists(length)
    batch.write_views([0])
    used = torch.full_like(batch.row(3), CHUNK)
    by_fa3 = RowsOfLists(batch, lists, used)
    rows = PagedRows(batch.table, None, batch.starts, batch.lens, used)
    views = batch.rows_of(batch.lens, used)
    shape = {"max_query_len": CHUNK, "max_seq_len": length, "scale": SCALE}
    case = f"{CHUNK} at {length // 1024}K"

    def full(layer: int) -> object:
        return fa3.attend(
            batch.query,
            batch.caches[layer],
            batch.out,
            views,
            **shape,
        )

    def streaming(layer: int) -> None:
        fa3.attend_sparse_prefill(
            batch.query, batch.caches[layer], batch.out, views,
            sink_tokens=SINK, window_tokens=WINDOW, **shape,
        )  # fmt: skip

    def score(layer: int) -> None:
        score_blocks(
            batch.query, batch.caches[layer], rows, lists.tasks, lists.lse, scale=SCALE,
            stride=STRIDE, **lists.sizes,
        )  # fmt: skip

    def choose(_: int) -> None:
        choose_blocks(
            lists.lse, lists.tasks, used, batch.lens, *lists.scratch,
            threshold=THRESHOLD, stride=STRIDE, **lists.sizes,
        )  # fmt: skip

    def attend(tile: SparseTile | None = None) -> Callable[[int], None]:
        return lambda layer: attend_blocks(
            batch.query, batch.caches[layer], batch.out, by_fa3.lists, scale=SCALE, tile=tile
        )

    def whole_layer(layer: int) -> None:
        score(layer)
        choose(layer)
        by_fa3.attend(layer)

    full_us = record("fa3 FULL", case, full, layers)
    assert full_us is not None, "no baseline, nothing to compare with"
    record("fa3 window + merge_sinks", case, streaming, layers)
    flop = 2 * HEADS * HEAD_DIM * CHUNK * (length - CHUNK / 2) / STRIDE
    record("score_blocks", case, score, layers, tflop=round(flop / 1e12, 3))
    record("choose_blocks", case, choose, layers)
    record("block_rows: gather_queries", case, by_fa3.gather, layers)
    record("block_rows: scatter_outputs", case, by_fa3.scatter, layers)
    write()
    for density in DENSITIES:
        share = lists.draw(density)
        what, floor_us = f"{case}, {density:.0%}", full_us * share
        record_share("block_rows", what, by_fa3.attend, layers, share, floor_us)
        record("block_rows: write_tables", what, by_fa3.tables, layers)
        record_share("block_rows: fa3 call", what, by_fa3.call, layers, share, floor_us)
        record_share("xattention layer", what, whole_layer, layers, share, floor_us)
        record_share("attend_blocks", what, attend(), layers, share, floor_us)
        for tile in TILES if sweep else ():
            name = f"attend_blocks {tile}"
            record_share(name, what, attend(SparseTile(*tile)), layers, share, floor_us)
        write()


def main() -> None:
    """Run every length and write each row with what it ran on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
    args = parser.parse_args()
    assert fa3.is_available(), "the baseline needs a Hopper GPU and vLLM"
    torch.manual_seed(0)
    # A run that is cut short leaves its rows, in the log and in the file.
    sys.stdout.reconfigure(line_buffering=True)
    try:
        for length in LENGTHS:
            bench(length, args.sweep, lambda: write_rows(args.out))
    finally:
        write_rows(args.out)


if __name__ == "__main__":
    main()
