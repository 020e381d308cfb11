"""FlashAttention-3's calls under flux's work plans: layout, attention, graphs, and a step's.

Oracles: `get_scheduler_metadata` of vLLM's operator; the float32 reference of attention.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.decode_plan import (
    CallShape,
    plan_width,
    write_decode_plans,
)
from flux_vllm.attention_backend.kernels.decode_views import NO_REQUEST
from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from tests.helpers import fa3_emulation
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
    check_rows,
    make_batch,
)
from tests.unit.attention_backend.test_kernels_decode_plan import (
    CASES,
    IDS,
    NUM_SPLITS,
    ceil_div,
    fa3s_splits,
    lengths_of,
    parts_of,
    plan_in_python,
    plans_of,
    tile_sizes,
)
from tests.unit.attention_backend.test_kernels_fa3 import attend

needs_fa3 = pytest.mark.skipif(not fa3.is_available(), reason="needs a Hopper GPU and vLLM's FA3")


@pytest.mark.gpu
@pytest.mark.vllm
@needs_fa3
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "most_queries", "rows"), CASES, ids=IDS)
def test_write_decode_plans_has_the_layout_of_fa3s_own(
    heads: int, kv_heads: int, head_dim: int, most_queries: int, rows: int, block_size: int
) -> None:
    from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    keys, starts = lengths_of(rows, most_queries, "cuda")
    shape = CallShape(heads, kv_heads, head_dim, sms)
    plans = plans_of(keys, starts, shape, most_queries)
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
        ours, fa3s = parts_of(plan, rows), parts_of(theirs, rows)
        assert (ours[0], ours[-1]) == (fa3s[0], fa3s[-1])
        tile_keys = tile_sizes(shape, most_queries)[1]
        same = [i for i in range(rows) if ours[1][i] == fa3s[1][i]]
        assert [part[i] for part in ours[2:-1] for i in same] == [
            part[i] for part in fa3s[2:-1] for i in same
        ]
        # FA3's own rule, which the balance is tested against.
        group_tiles = [ceil_div(n, tile_keys) for n in keys[layer, :rows].tolist()]
        query_tiles = [ceil_div(n, tile_sizes(shape, most_queries)[0]) for n in ours[0]]
        work = sum(q * k for q, k in zip(query_tiles, group_tiles, strict=True))
        assert fa3s[1] == fa3s_splits(group_tiles, work, kv_heads, sms)


def planned(batch: PagedBatch, views: Views, plans: torch.Tensor) -> torch.Tensor:
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
def test_attention_by_the_plan(shape: Shape, rows: list[Row]) -> None:
    """Twice over one plan: a call must leave the counter of tiles at 0."""
    rows = [*rows, decode(7000, FULL), decode(2500, SPARSE)]
    # With blocks as large as its tiles FA3 loads whole blocks: weight 0 times what is in them.
    batch = make_batch(rows, shape, "cuda", poison=float("nan") if shape.block_size < 128 else 3e4)
    views = views_of(batch)
    plans = torch.zeros(1, plan_width(len(rows)), dtype=torch.int32, device="cuda")
    plan = planned(batch, views, plans)
    for _ in range(2):
        out = batch.poisoned_output()
        attend(batch, views, out, scheduler_metadata=plan, num_splits=NUM_SPLITS)
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
    views.write(batch, torch.full((5, 1), FULL, dtype=torch.int8), [0])
    plans = torch.zeros(1, plan_width(5), dtype=torch.int32, device="cuda")
    plan = planned(batch, views, plans)
    attend(batch, views, out, scheduler_metadata=plan, num_splits=NUM_SPLITS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(batch, views, out, scheduler_metadata=plan, num_splits=NUM_SPLITS)
    for routes in ([FULL] * 5, [SPARSE, FULL], [SPARSE] * 4, [FULL]):
        real, padding = len(routes), 5 - len(routes)
        batch.rows = [decode(*of_row) for of_row in zip(lengths, routes, strict=False)]
        batch.rows += [Row(0, 0)] * padding
        batch.seq_lens.copy_(seq_lens)[real:] = 0
        batch.query_start_loc.copy_(starts.clamp(max=real))
        table = torch.tensor([[route] for route in routes + [NO_REQUEST] * padding])
        views.write(batch, table.to(torch.int8), [0])
        assert planned(batch, views, plans).data_ptr() == plan.data_ptr()
        out.fill_(float("nan"))
        graph.replay()
        check_rows(batch, out, [True] * 5)


@pytest.mark.vllm
@pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here")
def test_a_decode_step_plans_its_layers_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real builder and layers: a plan for steps of decode rows that a graph may replay.

    vLLM plans its own call then only in its first step, which looks at the model's windows.
    """
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    from tests.helpers.cuda_backend import BackendWorker

    plans: list[torch.Tensor | None] = []
    fast: list[bool] = []
    build = FlashAttentionMetadataBuilder.build

    def build_noted(*args: object) -> object:
        fast.append(bool(args[-1]))
        return build(*args)

    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", build_noted)

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
    assert fast == [False, True]
    # A short prompt goes to vLLM's own call, with its plan.
    prompt = make_batch([Row(30, 30)], Shape(), "cpu")
    worker.begin_step(prompt.rows)
    metadata = worker.metadata(prompt)
    assert metadata.flux is None
    assert fast == [False, True, False]
