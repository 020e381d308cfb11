"""Work plans of FlashAttention-3 against plain Python, and against FA3's own on a Hopper GPU.

Oracles: hopper/flash_prepare_scheduler.cu in numpy's float32; `get_scheduler_metadata` of vLLM's
operator, bit by bit but for the entries that nothing reads; attention without a plan.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton

from flux_vllm.attention_backend.cuda_views import ViewBuffers
from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.decode_plan import (
    MOST_ROWS,
    CallShape,
    plan_width,
    write_decode_plans,
)
from tests.helpers import fa3_emulation
from tests.unit.attention_backend.test_kernels_cases import (
    DEVICES,
    FULL,
    SPARSE,
    Batch,
    Row,
    Shape,
    check_rows,
    make_batch,
)
from tests.unit.attention_backend.test_kernels_decode import (
    AWKWARD,
    SPECULATIVE,
    Views,
    decode,
    views_of,
)

NUM_SPLITS, POISON = 32, -7
LAYERS = 3
needs_fa3 = pytest.mark.skipif(not fa3.is_available(), reason="needs a Hopper GPU and vLLM's FA3")

# (query heads, kv heads, head_dim, most queries a row, rows)
CASES = [
    (32, 8, 128, 1, 1),
    (32, 8, 128, 1, 5),
    (32, 8, 128, 1, 64),
    (32, 8, 128, 1, 300),
    (32, 8, 128, 4, 33),
    (9, 3, 64, 1, 8),
    (9, 3, 64, 2, 31),
    (1, 1, 64, 1, 1),
    (16, 1, 64, 1, 40),
    (16, 1, 64, 5, 7),
    (16, 1, 128, 5, 62),
    (4, 4, 128, 1, 17),
    (8, 8, 128, 3, 300),
    (8, 4, 64, 1, 300),
]
IDS = [f"N{n}-K{k}-H{h}-Q{q}-R{r}" for n, k, h, q, r in CASES]


def lengths_of(rows: int, most_queries: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw keys per layer and row, and where the rows' queries start; the last rows are padding."""
    keys = torch.rand(LAYERS, rows + 3).mul(np.log(70_000)).exp().int().clamp(1, 70_000)
    queries = torch.full((rows,), most_queries)
    padding = torch.arange(rows) >= rows - rows // 5
    queries[padding] = 0
    keys[:, :rows][:, padding] = 0
    keys[-1, :rows] = keys[-1, :rows].clamp(max=2000)  # all rows SPARSE
    starts = torch.cat([torch.zeros(1), queries.cumsum(0)]).int()
    return keys.to(device), starts.to(device)


def plan_in_python(
    keys: list[int], queries: list[int], shape: CallShape, most_queries: int
) -> list[list[int]]:
    """Plan one layer: the parts, unpadded, then the counter."""
    group, big = shape.heads // shape.kv_heads, shape.head_dim == 128
    small_tiles = most_queries * group <= 64
    tile_queries = 64 if small_tiles else 128 if big else 192
    tile_keys = 128 if big or not small_tiles else 192
    tiles = [-(-n // tile_keys) for n in keys]
    packed = [n * group for n in queries]
    work = sum(-(-q // tile_queries) * k for q, k in zip(packed, tiles, strict=True))
    even = np.float32(work) * np.float32(1.1) * np.float32(shape.kv_heads)
    share = max(int(np.ceil(even / np.float32(shape.num_sms))), 1)
    splits = [max(min(-(-n // share), NUM_SPLITS), 1) for n in tiles]
    parts = [packed, splits]
    if big or most_queries > 1:
        smaller = next(n for n in (1, 2, 4, 8, 16) if group <= n or n == 16)
        room = 32 * 2**20 // smaller // (tile_keys * 4 * shape.head_dim)
        each = [max(-(-n // s), 1) for n, s in zip(tiles, splits, strict=True)]
        fitting = [next((h for h in (16, 8, 4, 2) if n * h <= room), 1) for n in each]
        parts.append([min(h, shape.kv_heads) for h in fitting])
    return [*parts, [0]]


def parts_of(plan: torch.Tensor, rows: int) -> list[list[int]]:
    """Take a plan apart; what lies between R and its multiple of 4 is nobody's."""
    values, rounded = plan.tolist(), -(-rows // 4) * 4
    parts = [values[i : i + rows] for i in range(0, len(values) - 1, rounded)]
    return [*parts, values[-1:]]


def plans_of(
    keys: torch.Tensor, starts: torch.Tensor, shape: CallShape, most_queries: int
) -> torch.Tensor | None:
    width = plan_width(keys.shape[1])
    plans = torch.full((LAYERS, width), POISON, dtype=torch.int32, device=keys.device)
    return write_decode_plans(
        keys, starts, plans, shape, max_query_len=most_queries, num_splits=NUM_SPLITS
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "most_queries", "rows"), CASES, ids=IDS)
def test_write_decode_plans_is_fa3s_arithmetic(
    heads: int, kv_heads: int, head_dim: int, most_queries: int, rows: int, device: str
) -> None:
    shape = CallShape(heads, kv_heads, head_dim, 132)
    keys, starts = lengths_of(rows, most_queries, device)
    plans = plans_of(keys, starts, shape, most_queries)
    queries = starts.diff().tolist()
    for layer, plan in enumerate(plans):
        expected = plan_in_python(keys[layer, :rows].tolist(), queries, shape, most_queries)
        assert parts_of(plan, rows) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_write_decode_plans_of_padding_rows_alone(device: str) -> None:
    keys = torch.zeros(LAYERS, 6, dtype=torch.int32, device=device)
    starts = torch.zeros(6, dtype=torch.int32, device=device)
    plans = plans_of(keys, starts, CallShape(32, 8, 128, 132), 1)
    for plan in plans:
        assert parts_of(plan, 5) == [[0] * 5, [1] * 5, [8] * 5, [0]]


@pytest.mark.parametrize(
    ("shape", "most_queries", "splits", "rows"),
    [
        (CallShape(32, 8, 96, 132), 1, 32, 4),
        (CallShape(71, 1, 64, 132), 1, 32, 4),
        (CallShape(32, 8, 128, 132), 1, 0, 4),
        (CallShape(32, 8, 128, 132), 1, 1, 4),
        (CallShape(32, 8, 128, 132), 1, 32, MOST_ROWS + 1),
        (CallShape(32, 8, 128, 132), 1, 32, 0),
    ],
)
def test_write_decode_plans_leaves_other_calls_to_fa3(
    shape: CallShape, most_queries: int, splits: int, rows: int
) -> None:
    keys = torch.ones(LAYERS, rows, dtype=torch.int32)
    starts = torch.arange(rows + 1, dtype=torch.int32)
    plans = torch.full((LAYERS, plan_width(rows)), POISON, dtype=torch.int32)
    got = write_decode_plans(
        keys, starts, plans, shape, max_query_len=most_queries, num_splits=splits
    )
    assert got is None
    assert (plans == POISON).all()


def test_view_buffers_count_their_plans() -> None:
    views = ViewBuffers(6, 10, [0, 1, 3], 16, 20, 24, 44, torch.device("cpu"))
    held = [value for value in vars(views).values() if isinstance(value, torch.Tensor)]
    fixed = views.unrouted.nbytes + views._columns.nbytes
    assert sum(tensor.nbytes for tensor in held) - fixed == ViewBuffers.nbytes(6, 10, 3)


@pytest.mark.gpu
@pytest.mark.vllm
@needs_fa3
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "most_queries", "rows"), CASES, ids=IDS)
def test_write_decode_plans_is_what_fa3_plans(
    heads: int, kv_heads: int, head_dim: int, most_queries: int, rows: int, block_size: int
) -> None:
    from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    keys, starts = lengths_of(rows, most_queries, "cuda")
    plans = plans_of(keys, starts, CallShape(heads, kv_heads, head_dim, sms), most_queries)
    for layer, plan in enumerate(plans):
        theirs = get_scheduler_metadata(
            rows,
            most_queries,
            70_000,
            heads,
            kv_heads,
            head_dim,
            keys[layer, :rows],
            cu_seqlens_q=starts,
            page_size=block_size,
            causal=True,
            num_splits=NUM_SPLITS,
        )
        assert plan.shape == theirs.shape
        assert parts_of(plan, rows) == parts_of(theirs, rows)


def planned(batch: Batch, views: Views, plans: torch.Tensor) -> torch.Tensor:
    """Plan the first layer's call."""
    shape = batch.shape
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    plan = write_decode_plans(
        views.seqused_k[:1],
        batch.query_start_loc,
        plans,
        CallShape(shape.heads, shape.kv_heads, shape.head_dim, sms),
        max_query_len=max(row.query_len for row in batch.rows),
        num_splits=NUM_SPLITS,
    )
    assert plan is not None
    return plan[0]


def attend(batch: Batch, views: Views, out: torch.Tensor, plan: torch.Tensor | None) -> None:
    rows = len(batch.rows)
    fa3.attend(
        batch.query,
        batch.key_cache,
        batch.value_cache,
        out,
        views.table2,
        views.kv_batch_idx[0, :rows],
        batch.query_start_loc,
        views.seqused_k[0, :rows],
        max_query_len=max(row.query_len for row in batch.rows),
        max_seq_len=max(row.seq_len for row in batch.rows),
        scale=batch.scale,
        scheduler_metadata=plan,
        num_splits=NUM_SPLITS,
    )


@pytest.mark.gpu
@pytest.mark.vllm
@needs_fa3
@pytest.mark.parametrize("rows", [AWKWARD, SPECULATIVE], ids=["single", "speculative"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(dtype=torch.bfloat16, heads=16, kv_heads=1, block_size=64),
        Shape(dtype=torch.bfloat16, head_dim=128),
        Shape(dtype=torch.bfloat16, heads=32, kv_heads=8, head_dim=128, block_size=128),
    ],
    ids=str,
)
def test_attention_is_the_same_with_the_plan(shape: Shape, rows: list[Row]) -> None:
    """Twice over one plan: a call must leave the counter of tiles at 0."""
    rows = [*rows, decode(7000, FULL), decode(2500, SPARSE)]
    # With blocks as large as its tiles FA3 loads whole blocks: weight 0 times what is in them.
    batch = make_batch(rows, shape, "cuda", poison=float("nan") if shape.block_size < 128 else 3e4)
    views = views_of(batch)
    plans = torch.zeros(1, plan_width(len(rows)), dtype=torch.int32, device="cuda")
    plan = planned(batch, views, plans)
    expected = batch.poisoned_output()
    attend(batch, views, expected, None)
    for _ in range(2):
        out = batch.poisoned_output()
        attend(batch, views, out, plan)
        assert torch.equal(out, expected)
        assert plan[-1] == 0
    check_rows(batch, out, [True] * len(rows))


@pytest.mark.gpu
@pytest.mark.vllm
@needs_fa3
def test_graph_replay_follows_plans_that_change() -> None:
    """Captured over short rows; then lengths, routes and padding change under the graph."""
    shape = Shape(dtype=torch.bfloat16, head_dim=128)
    lengths = [9000, 150, 4000, 700, 33]
    batch = make_batch([decode(n, FULL) for n in lengths], shape, "cuda")
    views, out = views_of(batch), batch.poisoned_output()
    seq_lens, starts = batch.seq_lens.clone(), batch.query_start_loc.clone()
    batch.seq_lens.clamp_(max=16)
    views.write(batch, torch.full((5, 1), FULL, dtype=torch.int8), list(range(5)), [0])
    plans = torch.zeros(1, plan_width(5), dtype=torch.int32, device="cuda")
    plan = planned(batch, views, plans)
    attend(batch, views, out, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(batch, views, out, plan)
    for routes in ([FULL] * 5, [SPARSE, FULL], [SPARSE] * 4, [FULL]):
        real, padding = len(routes), 5 - len(routes)
        batch.rows = [decode(*of_row) for of_row in zip(lengths, routes, strict=False)]
        batch.rows += [Row(0, 0)] * padding
        batch.seq_lens.copy_(seq_lens)[real:] = 0
        batch.query_start_loc.copy_(starts.clamp(max=real))
        table = torch.tensor([[route] for route in routes], dtype=torch.int8)
        views.write(batch, table, [*range(real), *[-1] * padding], [0])
        assert planned(batch, views, plans).data_ptr() == plan.data_ptr()
        out.fill_(float("nan"))
        graph.replay()
        check_rows(batch, out, [True] * 5)


@pytest.mark.vllm
@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter")
def test_a_decode_step_plans_its_layers_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real builder and layers: a plan for steps of decode rows that a graph may replay."""
    from tests.helpers.cuda_backend import BackendWorker

    plans: list[torch.Tensor | None] = []

    def attend(*args: object, scheduler_metadata: torch.Tensor | None, **kwargs: object) -> object:
        plans.append(scheduler_metadata)
        return fa3_emulation.attend(*args, **kwargs)

    monkeypatch.setattr(fa3, "is_available", lambda: True)
    monkeypatch.setattr(fa3, "attend", attend)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    batch = make_batch([decode(90, SPARSE), decode(150, FULL), Row(0, 0)], Shape(), "cpu")
    worker = BackendWorker(tmp_path, batch, "fa3")
    for layer in worker.layers:
        layer.impl.vllm_flash_attn_version = 3
    worker.check(batch, worker.step(batch))
    assert plans == [None] * 2
    worker.builder.use_full_cuda_graph = True
    worker.builder.max_cudagraph_size, worker.builder.max_num_splits = 64, NUM_SPLITS
    worker.check(batch, worker.step(batch))
    for plan, keys in zip(plans[2:], ([58, 150, 0], [90, 118, 0]), strict=True):
        expected = plan_in_python(keys, [1, 1, 0], CallShape(4, 2, 64, 132), 1)
        assert parts_of(plan, 3) == expected
        assert plan.is_contiguous()
