"""The CUDA backend over the batches of vLLM's own backend test, with mixed routes.

Oracle: `tests.helpers.oracle.naive`, its mask with sinks and window; the bound is twice
plain torch's error in the same dtype. Blocks of a row are in no order; block 0, blocks of no row,
slots past a row's length and outputs are poisoned.
"""

from dataclasses import replace

import pytest
import torch

from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.routing.decode_counts import DecodeKeys
from tests.helpers.oracle import naive
from tests.unit.attention_backend.test_kernels_cases import FULL, SPARSE, Row, Shape, make_batch

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

DEVICE = "cuda"
KERNELS = [
    pytest.param(
        "fa3",
        marks=pytest.mark.skipif(not fa3.is_available(), reason="needs a Hopper GPU and FA3"),
    ),
    "triton",
]
BASE = Shape(
    heads=8,
    kv_heads=2,
    head_dim=128,
    dtype=torch.bfloat16,
    sink_tokens=40,
    window_tokens=200,
)
# One step away from BASE each: GQA 1, 8, 16, then head_dim, dtype, block size.
SHAPES = [
    replace(BASE, heads=4, kv_heads=4),
    replace(BASE, heads=8, kv_heads=1),
    replace(BASE, heads=16, kv_heads=1),
    replace(BASE, head_dim=64),
    replace(BASE, head_dim=96),
    replace(BASE, head_dim=256),
    replace(BASE, dtype=torch.float16),
    replace(BASE, block_size=64),
    replace(BASE, block_size=128),
    # gpt-oss.
    replace(BASE, heads=64, kv_heads=8, head_dim=64, learned_sinks=True),
]
# (seq_lens, query_lens); several queries are a prompt's but in `drafts`.
BATCHES = {
    "small_decode": ([32, 40], [1, 1]),
    "small_prefill": ([32, 40], [8, 8]),
    "mixed_small": ([32, 40, 48, 56], [1, 1, 5, 5]),
    "medium_decode": ([128, 256, 512, 1024] * 2, [1] * 8),
    "medium_prefill": ([256, 512, 1024, 2048], [16] * 4),
    "mixed_medium": ([512, 1024, 2048] * 2, [1, 1, 1, 7, 7, 7]),
    "mixed_large": ([1024, 2048, 4096] * 2, [1, 1, 1, 32, 32, 32]),
    "large_decode": ([2048] * 32, [1] * 32),
    "large_prefill": ([4096] * 8, [32] * 8),
    "single_decode": ([1024], [1]),
    "single_prefill": ([1024], [64]),
    "drafts": ([300, 1024, 77, 2048], [4, 4, 2, 1]),
}


def _rows(name: str) -> list[Row]:
    pairs = list(zip(*BATCHES[name], strict=True))
    return [
        # Alternate, and start over with the other route half-way: every length has both.
        Row(queries, seq, (i + (i >= len(pairs) // 2)) % 2, queries > 1 and name != "drafts")
        for i, (seq, queries) in enumerate(pairs)
    ]


def _batch(rows: list[Row], shape: Shape):
    # FA3 reads whole blocks where its tiles divide them, and masks by scores: NaN would spread.
    poison = float("nan") if shape.block_size < 64 else 3e4
    return make_batch(rows, shape, DEVICE, poison=poison)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("shapes")


def _check_step(folder, name: str, shape: Shape, kernels: str) -> None:
    from tests.helpers.cuda_backend import BackendWorker

    batch = _batch(_rows(name), shape)
    worker = BackendWorker(folder, batch, kernels)
    worker.check(batch, worker.step(batch))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", BATCHES)
def test_batches(folder, name, kernels):
    _check_step(folder, name, BASE, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["medium_decode", "mixed_medium"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(folder, shape, name, kernels):
    _check_step(folder, name, shape, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_graph_replays_under_other_routes_and_lengths(folder, kernels):
    """One capture of four rows serves other routes, other lengths, and three rows of the four."""
    from tests.helpers.cuda_backend import BackendWorker

    rows = [Row(1, n, FULL, False) for n in (2000, 300, 1000, 161)]
    batch = _batch(rows, BASE)
    worker = BackendWorker(folder, batch, kernels)
    # vLLM captures a dummy batch, which no request stands behind.
    metadata = worker.metadata(batch)
    outputs = [batch.poisoned_output() for _ in worker.layers]
    worker.forward(batch, metadata, outputs)  # compiles
    torch.cuda.synchronize()
    metadata = worker.metadata(batch)  # of a step whose views are still to be written
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        worker.forward(batch, metadata, outputs)
    for lengths, routes in (
        ([2000, 300, 1000, 161], [SPARSE, FULL, FULL, SPARSE]),
        ([1999, 257, 999, 160], [FULL, SPARSE, SPARSE, FULL]),
        ([700, 256, 16, 0], [SPARSE, SPARSE, FULL, FULL]),
    ):
        _refill(batch, lengths, routes)
        for out in outputs:
            out.fill_(float("nan"))
        worker.begin_step(batch.rows)
        metadata = worker.metadata(batch)
        graph.replay()
        worker.check(batch, outputs)
        counted = worker.runtime.decode_counts.read()
        assert counted == _keys(batch.rows, len(outputs))
        eager = [batch.poisoned_output() for _ in worker.layers]
        worker.forward(batch, metadata, eager)
        worker.check(batch, eager)
        assert worker.runtime.decode_counts.read() == counted
        worker.runtime.end_step()


def _keys(rows: list[Row], layers: int) -> DecodeKeys:
    """Count what decode rows read; odd layers have the opposite routes."""
    attended = context = 0
    for row in rows:
        first, size = row.seq_len - row.query_len, BASE.block_size
        kept = naive.compacted_blocks(
            first, row.seq_len, BASE.sink_tokens, BASE.window_tokens, size
        )
        dropped = (-(-row.seq_len // size) - len(kept)) * size
        for layer in range(layers * row.query_len):
            context += row.seq_len
            attended += row.seq_len - dropped * ((row.route ^ (layer % 2)) == SPARSE)
    return DecodeKeys(attended, context, 0)


def _refill(batch, lengths: list[int], routes: list[int]) -> None:
    """Give a decode batch other rows in the same tensors; a row of length 0 is padding."""
    batch.rows = [Row(int(n > 0), n, r, False) for n, r in zip(lengths, routes, strict=True)]
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    newest = (seq_lens - 1).clamp(min=0)
    size = batch.shape.block_size
    blocks = batch.block_table.gather(1, (newest // size).long()[:, None])[:, 0]
    slots = torch.where(seq_lens > 0, blocks * size + newest % size, -1)
    batch.seq_lens.copy_(seq_lens)
    batch.query_start_loc[1:] = (seq_lens > 0).cumsum(0)
    batch.slot_mapping.copy_(slots)
    batch.query.normal_()
