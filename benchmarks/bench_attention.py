"""Time the GPU kernels at the Llama-3.1-8B shape against vLLM's FlashAttention-3, on one GPU.

    python -m benchmarks.bench_attention --out FILE.json [--only decode,prefill] [--sweep]

GPU times come from CUDA graphs whose calls go around several KV caches, so that none is found in
the L2 cache; host times are what the caller's thread spends on a call. Baseline: vLLM's own
wrapper with the work plan that its backend computes ahead (`flash_attn_varlen_func`).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.row_file import RowFile
from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.decode_views import (
    GroupTables,
    LayerViews,
    RoutedColumns,
    StepRows,
    ViewSizes,
    write_views,
)
from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows
from flux_vllm.attention_backend.kernels.sink_merge import MergeTile, merge_sinks
from flux_vllm.attention_backend.kernels.triton_decode import (
    attend_decode,
    choose_num_splits,
    decode_workspace,
)
from flux_vllm.attention_backend.kernels.triton_prefill import PrefillTile, attend_prefill

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
SINK, WINDOW = 128, 2048
SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16
ROWS: list[dict[str, object]] = []


def record(kernel: str, case: str, fn: Callable[[int], object], layers: int, **extra: object):
    """Time calls fn(0) .. fn(layers - 1) in a graph, and what the host spends on one."""
    try:
        for layer in range(layers):
            fn(layer)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for layer in range(layers):
            fn(layer)
        host = (time.perf_counter() - begin) / layers
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(layers):
                fn(layer)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times: list[float] = []
        spent = time.perf_counter()
        while len(times) < 5 or (len(times) < 30 and time.perf_counter() - spent < 0.3):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / layers)
        times = times[1:]
    except Exception as error:  # noqa: BLE001 - one failing variant must not cost the others
        failure = f"{type(error).__name__}: {str(error)[:150]}"
        ROWS.append({"kernel": kernel, "case": case, "failure": failure})
        print(f"{kernel:34s} {case:34s} FAILED {failure}")
        torch.cuda.synchronize()
        return None
    row = {
        "kernel": kernel,
        "case": case,
        "us": round(statistics.median(times), 2),
        "low_us": round(min(times), 2),
        "high_us": round(max(times), 2),
        "repeats": len(times),
        "calls_per_repeat": layers,
        "host_us": round(host * 1e6, 1),
        **extra,
    }
    ROWS.append(row)
    print(f"{kernel:34s} {case:34s} {row['us']:10.1f} us  host {row['host_us']:7.1f} us {extra}")
    return row["us"]


def write_rows(path: Path) -> None:
    """Write every row with its shape and what it ran on."""
    shape = (
        f"heads {HEADS}/{KV_HEADS}, head_dim {HEAD_DIM}, bf16, block {BLOCK_SIZE}, "
        f"sink {SINK}, window {WINDOW}"
    )
    RowFile(path).keep_all([row | {"shape": shape} for row in ROWS])


class Batch:
    """Rows of given lengths over `layers` KV caches, with every buffer that the kernels take."""

    def __init__(self, query_lens: list[int], seq_lens: list[int], layers: int, prefill: bool):
        rows = self.rows = len(seq_lens)
        self.layers = layers
        blocks = [-(-n // BLOCK_SIZE) for n in seq_lens]
        num_blocks = 1 + sum(blocks)
        self.caches = []
        for _ in range(layers):
            packed = torch.empty(
                num_blocks, BLOCK_SIZE, KV_HEADS, 2 * HEAD_DIM, dtype=DTYPE, device="cuda"
            ).normal_()
            self.caches.append(KVCache(*packed.split(HEAD_DIM, dim=-1)))
        order = 1 + torch.randperm(num_blocks - 1)
        self.table = torch.zeros(rows, max(blocks) + 8, dtype=torch.int32)
        for row in range(rows):
            self.table[row, : blocks[row]] = order[sum(blocks[:row]) :][: blocks[row]]
        self.table = self.table.cuda()
        tokens = sum(query_lens)
        self.query = torch.randn(tokens, HEADS, HEAD_DIM, device="cuda").to(DTYPE)
        self.out = torch.empty_like(self.query)
        self.starts = torch.tensor([0, *query_lens]).cumsum(0).int().cuda()
        self.lens = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
        self.max_query, self.max_seq = max(query_lens), max(seq_lens)
        self.capacity = capacity = max(4, rows)
        self.table2 = torch.zeros(2 * capacity, self.table.shape[1], dtype=torch.int32).cuda()
        self.per_layer = LayerViews(
            *(torch.zeros(32, capacity, dtype=torch.int32, device="cuda") for _ in range(4))
        )
        self.is_prefill = torch.ones(rows, dtype=torch.int8, device="cuda") if prefill else None
        self.columns = RoutedColumns(
            torch.arange(32, dtype=torch.int32, device="cuda"),
            torch.ones(32, dtype=torch.int8, device="cuda"),
        )
        layout = GroupTables.measure([self.table], [self.table2])
        self.tables = GroupTables(self.table, self.table2, torch.tensor(layout, device="cuda"))
        self.totals = None
        if not prefill:
            self.totals = torch.zeros(3, capacity, dtype=torch.int64, device="cuda")

    def write_views(self, routes: list[int]) -> None:
        table = torch.tensor(routes, dtype=torch.int8)[:, None].expand(-1, 32).contiguous().cuda()
        self.routes = table
        self.views()

    def views(self) -> None:
        write_views(
            self.tables,
            StepRows(self.lens, self.starts, self.routes, None, self.is_prefill),
            self.columns,
            self.per_layer,
            self.totals,
            ViewSizes(BLOCK_SIZE, SINK, WINDOW, SINK + WINDOW),
            width=self.table.shape[1],
        )

    def rows_of(self, seqused_k: torch.Tensor, seqused_q: torch.Tensor | None = None) -> PagedRows:
        return PagedRows(self.table2, self.row(0), self.starts, seqused_k, seqused_q)

    def row(self, buffer: int) -> torch.Tensor:
        return self.per_layer[buffer][0, : self.rows]


def baseline_decode(batch: Batch, splits: int) -> Callable[[int], object]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    plan = get_scheduler_metadata(
        batch_size=batch.rows,
        max_seqlen_q=batch.max_query,
        max_seqlen_k=batch.max_seq,
        num_heads_q=HEADS,
        num_heads_kv=KV_HEADS,
        headdim=HEAD_DIM,
        cache_seqlens=batch.lens,
        qkv_dtype=DTYPE,
        cu_seqlens_q=batch.starts,
        page_size=BLOCK_SIZE,
        causal=True,
        window_size=(-1, -1),
        num_splits=splits,
    )

    def run(layer: int) -> object:
        return flash_attn_varlen_func(
            q=batch.query,
            k=batch.caches[layer][0],
            v=batch.caches[layer][1],
            out=batch.out,
            cu_seqlens_q=batch.starts,
            max_seqlen_q=batch.max_query,
            seqused_k=batch.lens,
            max_seqlen_k=batch.max_seq,
            softmax_scale=SCALE,
            causal=True,
            block_table=batch.table,
            scheduler_metadata=plan,
            num_splits=splits,
            fa_version=3,
        )

    return run


def bench_decode(sms: int, sweep: bool) -> None:
    for rows, length, layers in ((1, 131072, 12), (4, 131072, 6), (16, 16384, 8)):
        batch = Batch([1] * rows, [length] * rows, layers, prefill=False)
        name = f"{rows}x{length // 1024}K"
        floor = rows * length * KV_HEADS * HEAD_DIM * 4 / 4.3e6
        record("FLASH_ATTN", name, baseline_decode(batch, 32), layers, floor_us=round(floor, 1))
        half = [i % 2 for i in range(rows)]
        cases = {"all FULL": [1] * rows, "all SPARSE": [0] * rows, "half": half}
        for what, routes in cases.items():
            if what == "half" and rows == 1:
                continue
            batch.write_views(routes)

            def run(layer: int, batch: Batch = batch, **extra: object) -> object:
                return fa3.attend(
                    batch.query,
                    batch.caches[layer],
                    batch.out,
                    batch.rows_of(batch.row(1)),
                    max_query_len=1,
                    max_seq_len=batch.max_seq,
                    scale=SCALE,
                    num_splits=32,
                    **extra,
                )

            record("fa3 views", f"{name} {what}", run, layers)
            chosen = choose_num_splits(rows, KV_HEADS, sms)
            for splits in sorted({chosen, 16}) if sweep else [chosen]:
                space = decode_workspace(rows, HEADS, HEAD_DIM, splits, torch.device("cuda"))
                for block_n in (64, 128) if sweep else (128,):

                    def run_triton(layer: int, batch=batch, space=space, n=block_n) -> None:
                        attend_decode(
                            batch.query,
                            batch.caches[layer],
                            batch.out,
                            batch.rows_of(batch.row(1)),
                            space,
                            max_query_len=1,
                            scale=SCALE,
                            block_n=n,
                        )

                    record(f"triton decode P{splits} N{block_n}", f"{name} {what}", run_triton,
                           layers)  # fmt: skip
        record("write_views 32 layers", name, lambda _, b=batch: b.views(), 8)
        del batch


def bench_prefill(sweep: bool) -> None:
    for chunk, length, layers in ((8192, 131072, 4), (8192, 8192, 4), (2048, 32768, 4)):
        batch = Batch([chunk], [length], layers, prefill=True)
        batch.write_views([0])
        none, every = torch.zeros_like(batch.row(3)), torch.full_like(batch.row(3), chunk)
        shape = {"max_query_len": chunk, "max_seq_len": length, "scale": SCALE}
        sinks = {"scale": SCALE, "sink_tokens": SINK, "window_tokens": WINDOW}
        case = f"{chunk} at {length // 1024}K"

        def full(layer: int, used=every, batch=batch, shape=shape) -> torch.Tensor:
            rows = batch.rows_of(batch.lens, used)
            return fa3.attend(batch.query, batch.caches[layer], batch.out, rows, **shape)

        def window(layer: int, used=every, batch=batch, shape=shape) -> torch.Tensor:
            rows = batch.rows_of(batch.lens, used)
            return fa3.attend(
                batch.query, batch.caches[layer], batch.out, rows, window_tokens=WINDOW, **shape
            )

        lse = window(0)

        def merge(layer: int, used=every, tile=None, batch=batch, lse=lse, sinks=sinks) -> None:
            merge_sinks(
                batch.query, batch.caches[layer], batch.out, lse,
                batch.rows_of(batch.lens, used), tile=tile, **sinks,
            )  # fmt: skip

        def fused(layer: int, used=every, tile=None, sparse=True, batch=batch, sinks=sinks) -> None:
            attend_prefill(
                batch.query, batch.caches[layer], batch.out, batch.rows_of(batch.lens, used),
                sparse=sparse, tile=tile, **sinks,
            )  # fmt: skip

        def both(layer: int, window=window, merge=merge) -> None:
            window(layer)
            merge(layer)

        record("FLASH_ATTN FULL", case, baseline_decode(batch, 0), layers)
        record("fa3 FULL", case, full, layers)
        record("fa3 FULL, skipped", case, lambda i, f=full, n=none: f(i, n), layers)
        record("fa3 window", case, window, layers)
        record("fa3 window, skipped", case, lambda i, f=window, n=none: f(i, n), layers)
        record("fa3 window + merge_sinks", case, both, layers)
        record("merge_sinks", case, merge, layers)
        record("merge_sinks, skipped", case, lambda i, f=merge, n=none: f(i, n), layers)
        record("triton SPARSE", case, fused, layers)
        record("triton SPARSE, skipped", case, lambda i, f=fused, n=none: f(i, n), layers)
        if sweep and length == 131072:
            for tile in MERGE_TILES:
                record(f"merge_sinks {tile}", case,
                       lambda i, f=merge, t=tile: f(i, tile=MergeTile(*t)), layers)  # fmt: skip
            for tile in PREFILL_TILES:
                record(f"triton SPARSE {tile}", case,
                       lambda i, f=fused, t=tile: f(i, tile=PrefillTile(*t)), layers)  # fmt: skip
        record("triton FULL", case, lambda i, f=fused: f(i, sparse=False), 1)
        del batch


MERGE_TILES = [
    (64, 128, 1, 4, 1), (64, 128, 2, 4, 2), (64, 128, 4, 4, 1), (64, 128, 4, 4, 2),
    (64, 128, 8, 4, 2), (64, 64, 4, 4, 2), (128, 128, 4, 8, 2), (128, 128, 8, 8, 1),
    (128, 64, 4, 8, 2), (32, 128, 4, 4, 2),
]  # fmt: skip
PREFILL_TILES = [
    (64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 2, 128),
    (128, 64, 8, 3, 128), (128, 32, 8, 3, 128), (128, 32, 8, 4, 128), (256, 64, 16, 2),
    (256, 64, 16, 3), (256, 32, 16, 3), (256, 128, 16, 2), (256, 64, 8, 3), (256, 32, 8, 3),
]  # fmt: skip


def main() -> None:
    """Run the chosen parts and write every row with what it ran on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="decode,prefill")
    parser.add_argument("--sweep", action="store_true", help="also time other tiles and splits")
    args = parser.parse_args()
    assert fa3.is_available(), "the baseline needs a Hopper GPU and vLLM"
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(0)
    parts = {
        "decode": lambda: bench_decode(device.multi_processor_count, args.sweep),
        "prefill": lambda: bench_prefill(args.sweep),
    }
    try:
        for part in args.only.split(","):
            parts[part]()
    finally:
        write_rows(args.out)


if __name__ == "__main__":
    main()
