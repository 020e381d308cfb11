"""Check the benchmarks' head split over a whole batch.

Oracle: `tests.helpers.oracle.naive`, once with all rows FULL for the first half of the
heads, once with the rows' own routes for the other half.
"""

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.experiments.head_split import HeadSplitKernels
from tests.helpers.cuda_backend import BackendWorker
from tests.unit.attention_backend.test_kernels_cases import (
    FULL,
    PagedBatch,
    assert_as_exact_as_torch,
)


def check_head_split(folder: Path, batch: PagedBatch, kernels: str) -> None:
    """Run two layers with opposite routes twice and hold each head half to its oracle."""
    worker = BackendWorker(folder, batch, kernels)
    worker.step(batch)  # chooses the kernels
    for layer in worker.layers:
        layer.impl.kernels = HeadSplitKernels(layer.impl.kernels)
    for _ in range(2):
        for index, out in enumerate(worker.step(batch)):
            routes = [replace(row, route=row.route ^ index) for row in batch.rows]
            everything = [replace(row, route=FULL) for row in batch.rows]
            for half, rows in enumerate((everything, routes)):
                _check_half(replace(batch, rows=rows), out, half, f"layer {index} half {half}")


def _check_half(batch: PagedBatch, out: torch.Tensor, half: int, what: str) -> None:
    heads = batch.shape.heads // 2
    part = slice(half * heads, (half + 1) * heads)
    exact, low = batch.oracle()[:, part], batch.oracle(batch.shape.dtype)[:, part]
    for index, row in enumerate(batch.rows):
        if row.query_len:
            tokens = batch.tokens_of(index)
            what_row = f"{what} row {index} {row}"
            assert_as_exact_as_torch(out[tokens, part], exact[tokens], low[tokens], what_row)
