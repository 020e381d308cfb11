"""FlashAttention-3 with row indices against the float32 oracle, and inside CUDA graphs.

Needs a Hopper GPU and vLLM's FA3 operator. Outputs start as NaN, and so does every KV slot that no
row holds: a row that should be skipped, or a key that should not be read, shows.
"""

from collections.abc import Callable

import pytest
import torch

from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.decode_views import NO_REQUEST
from tests.unit.attention_backend.decode_rows import (
    AWKWARD,
    SPECULATIVE,
    Views,
    decode,
    views_of,
)
from tests.unit.attention_backend.test_kernels_cases import (
    FULL,
    SPARSE,
    PagedBatch,
    Row,
    Shape,
    assert_as_exact_as_torch,
    check_rows,
    make_batch,
)
from tests.unit.attention_backend.test_kernels_prefill import AWKWARD as AWKWARD_PREFILL
from tests.unit.attention_backend.test_kernels_prefill import LONG_CASES, LONG_IDS, _by_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not fa3.is_available(), reason="needs a Hopper GPU and vLLM's FA3"),
]

BF16 = torch.bfloat16
SHAPES = [
    Shape(),
    Shape(dtype=BF16, head_dim=128),
    Shape(dtype=BF16, heads=8, kv_heads=1, head_dim=128, block_size=32),
    Shape(dtype=BF16, heads=9, kv_heads=3, head_dim=96),
    Shape(dtype=BF16, heads=4, kv_heads=4, head_dim=256),
    Shape(dtype=BF16, heads=16, kv_heads=1, block_size=64),
    Shape(dtype=BF16, heads=64, kv_heads=8, learned_sinks=True),
    Shape(dtype=BF16, heads=32, kv_heads=8, head_dim=128, float8=True),
    Shape(dtype=BF16, heads=8, kv_heads=1, block_size=64, float8=True),
]


def attend(
    batch: PagedBatch,
    views: Views,
    out: torch.Tensor,
    seqused_q: torch.Tensor | None = None,
    **extra: object,
) -> torch.Tensor:
    batch.by_fa3 = True
    return fa3.attend(
        batch.query,
        batch.cache,
        out,
        views.rows_of(batch, seqused_q),
        max_query_len=max(row.query_len for row in batch.rows),
        max_seq_len=max(row.seq_len for row in batch.rows),
        scale=batch.scale,
        sink_logits=batch.sink_logits,
        float8=batch.float8,
        **extra,
    )


def two_passes(batch: PagedBatch, views: Views, out: torch.Tensor) -> None:
    """Attend a batch with prefill rows as a layer does: full pass, then sparse pass."""
    rows = len(batch.rows)
    attend(batch, views, out, seqused_q=views.full_seqused_q[0, :rows])
    fa3.attend_sparse_prefill(
        batch.query,
        batch.cache,
        out,
        views.rows_of(batch, views.sparse_seqused_q[0, :rows]),
        max_query_len=max(row.query_len for row in batch.rows),
        max_seq_len=max(row.seq_len for row in batch.rows),
        scale=batch.scale,
        sink_tokens=batch.shape.sink_tokens,
        window_tokens=batch.shape.window_tokens,
        sink_logits=batch.sink_logits,
        float8=batch.float8,
    )


@pytest.mark.parametrize("num_splits", [0, 1, 32])
@pytest.mark.parametrize("rows", [AWKWARD, SPECULATIVE], ids=["single", "speculative"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_decodes_mixed_routes(shape: Shape, rows: list[Row], num_splits: int) -> None:
    batch = make_batch(rows, shape, "cuda")
    out = batch.poisoned_output()
    attend(batch, views_of(batch), out, num_splits=num_splits)
    check_rows(batch, out, [True] * len(rows))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_passes_serve_a_mixed_batch(shape: Shape) -> None:
    rows = [*AWKWARD_PREFILL, *SPECULATIVE]
    batch = make_batch(rows, shape, "cuda")
    out = batch.poisoned_output()
    two_passes(batch, views_of(batch), out)
    check_rows(batch, out, [True] * len(rows))


@pytest.mark.parametrize("query_len", [1, 17, 300])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_attend_leaves_skipped_rows_alone(shape: Shape, query_len: int) -> None:
    rows = [Row(query_len, 5000), Row(1, 5000), Row(query_len, 700)]
    batch = make_batch(rows, shape, "cuda")
    views = views_of(batch)
    for chosen in ([True, False, False], [False, True, False], [False, False, True]):
        out = batch.poisoned_output()
        attend(batch, views, out, seqused_q=batch.seqused_q(chosen))
        for index in range(3):
            written = out[batch.tokens_of(index)].isfinite()
            assert written.all() if chosen[index] else not written.any()


@pytest.mark.parametrize(("shape", "length"), LONG_CASES, ids=LONG_IDS)
def test_two_passes_long(shape: Shape, length: int) -> None:
    query_len = min(length, 1031)
    rows = [Row(query_len, length, SPARSE), Row(257, length - 1, FULL), Row(33, length, SPARSE)]
    # With blocks as large as its tiles FA3 loads whole blocks: weight 0 times what is in them.
    poison = float("nan") if shape.block_size < 128 else 3e4
    batch = make_batch(rows, shape, "cuda", poison=poison)
    out = batch.poisoned_output()
    two_passes(batch, views_of(batch), out)
    exact = torch.cat([_by_torch(batch, row, torch.float32) for row in range(3)])
    low = torch.cat([_by_torch(batch, row, shape.dtype) for row in range(3)])
    assert_as_exact_as_torch(out, exact, low)


def test_graph_replay_follows_routes_that_change() -> None:
    shape = Shape(dtype=BF16, head_dim=128)
    rows = [decode(200, SPARSE), decode(150, FULL), decode(90, SPARSE), Row(0, 0)]
    batch = make_batch(rows, shape, "cuda")
    views = views_of(batch)
    out = batch.poisoned_output()
    run: Callable[[], object] = lambda: attend(batch, views, out, num_splits=32)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for routes in ([SPARSE, FULL, SPARSE], [FULL, SPARSE, SPARSE], [FULL] * 3, [SPARSE] * 3):
        batch.rows = [
            *(Row(1, row.seq_len, route, False) for row, route in zip(rows, routes, strict=False)),
            Row(0, 0),
        ]
        table = torch.tensor([[route] for route in routes], dtype=torch.int8)
        views.write(batch, torch.nn.functional.pad(table, (0, 0, 0, 1), value=NO_REQUEST), [0])
        out.fill_(float("nan"))
        graph.replay()
        check_rows(batch, out, [True] * 4)
