"""The CUDA backend under the other sparse patterns: whole batches through builder and layers.

Oracle: each pattern's definition (tests/helpers/oracle/masks.py), attended to by naive.py; the
bound is that of test_kernels_cases. The definitions are held to masks written apart from them in
test_patterns.py.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.attention_backend.cuda.patterns import plan_batch, prefill_nbytes
from flux_vllm.attention_backend.kernels import block_rows, block_sparse, fa3
from flux_vllm.attention_backend.kernels.block_choice import choose_blocks
from flux_vllm.attention_backend.kernels.block_tasks import pack_block_tasks
from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows
from flux_vllm.attention_backend.kernels.strided_scores import score_blocks, tasks_a_program
from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from flux_vllm.batch import Batch
from flux_vllm.config import FluxConfig
from flux_vllm.patterns import make_pattern
from tests.helpers import fa3_emulation
from tests.helpers.oracle import block_choice
from tests.helpers.oracle.naive import gather_pages
from tests.unit.attention_backend.test_kernels_cases import (
    DEVICES,
    FULL,
    SPARSE,
    Row,
    Shape,
    make_batch,
)

pytestmark = pytest.mark.vllm

TRIANGLE = {"sparse_pattern": "triangle", "pattern_options": {"tail_tokens": 11}}
# Chunks before the tail, that reach into it, within it, of one token; resumed past the prompt.
TRIANGLE_ROWS = {
    "prefill": [
        Row(30, 90, SPARSE),
        Row(30, 90, SPARSE, prompt_len=200),
        Row(30, 90, SPARSE, prompt_len=95),
        Row(5, 80, SPARSE, prompt_len=80),
        Row(1, 70, SPARSE, prompt_len=81),
        Row(1, 70, SPARSE, prompt_len=80),
        Row(25, 75, SPARSE, prompt_len=60),
        Row(12, 60, FULL, prompt_len=60),
        Row(40, 40, SPARSE),
    ],
    "mixed": [
        Row(1, 92, SPARSE, False),
        Row(1, 40, FULL, False),
        Row(30, 88, SPARSE),
        Row(17, 56),
        Row(0, 0),
    ],
}


@pytest.fixture(autouse=True)
def _gpu_of_four_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter stand for a GPU without FlashAttention-3."""
    from tests.helpers.cuda_backend import stand_for_gpu

    if INTERPRETED:
        stand_for_gpu(monkeypatch)


def check(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Row],
    shape: Shape,
    device: str,
    pattern: dict[str, Any],
    kernels: str = "triton",
) -> None:
    from tests.helpers.cuda_backend import BackendWorker

    # FA3 reads whole blocks where its tiles divide them, and masks by scores: NaN would spread.
    whole_blocks = kernels == "fa3" and shape.block_size >= 64
    batch = make_batch(rows, shape, device, poison=3e4 if whole_blocks else float("nan"))
    batch.by_fa3 = kernels == "fa3" and device == "cuda"
    sizes = (shape.sink_tokens, shape.window_tokens)
    batch.pattern = make_pattern(pattern["sparse_pattern"], *sizes, pattern["pattern_options"])
    worker = BackendWorker(tmp_path_factory.getbasetemp(), batch, kernels, **pattern)
    if kernels == "fa3" and device == "cpu":
        for layer in worker.layers:
            layer.impl.vllm_flash_attn_version = 3
    worker.check(batch, worker.step(batch))


@pytest.fixture
def _emulated_fa3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter stand for a GPU with FlashAttention-3 in plain torch, Triton barred."""
    monkeypatch.setattr(block_sparse, "attend_blocks", lambda *_, **__: pytest.fail("by Triton"))
    if INTERPRETED:
        monkeypatch.setattr(fa3, "is_available", lambda: True)
        monkeypatch.setattr(fa3, "attend", fa3_emulation.attend)
    elif not fa3.is_available():
        pytest.skip("needs a Hopper GPU and FA3")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRIANGLE_ROWS)
def test_triangle(name: str, device: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(tmp_path_factory, TRIANGLE_ROWS[name], Shape(), device, TRIANGLE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRIANGLE_ROWS)
def test_triangle_with_learned_sinks(
    name: str, device: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A prompt's tail, which is attended to twice, counts its sinks once."""
    shape = Shape(learned_sinks=True)
    check(tmp_path_factory, TRIANGLE_ROWS[name], shape, device, TRIANGLE)


@pytest.mark.gpu
@pytest.mark.skipif(not fa3.is_available(), reason="needs a Hopper GPU and FA3")
@pytest.mark.parametrize("name", TRIANGLE_ROWS)
def test_triangle_with_fa3(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    for shape in Shape(), Shape(dtype=torch.bfloat16, learned_sinks=True):
        check(tmp_path_factory, TRIANGLE_ROWS[name], shape, "cuda", TRIANGLE, "fa3")


XATTENTION = {"sparse_pattern": "xattention", "pattern_options": {"threshold": 0.6}}
# Chunk edges within blocks and on them, one query, one strided row, short rows, padding.
XATTENTION_ROWS = {
    "prefill": [
        Row(300, 300, SPARSE),
        Row(200, 701, SPARSE),
        Row(128, 640, SPARSE, prompt_len=900),
        Row(1, 513, SPARSE),
        Row(17, 512, SPARSE),
        Row(40, 200, SPARSE),
        Row(150, 400, FULL),
    ],
    "mixed": [
        Row(1, 92, SPARSE, False),
        Row(1, 300, FULL, False),
        Row(30, 590, SPARSE),
        Row(17, 356, FULL),
        Row(0, 0),
    ],
}
XATTENTION_SHAPES = [
    Shape(),
    Shape(heads=3, kv_heads=3, dtype=torch.bfloat16),
    Shape(heads=9, kv_heads=3, block_size=64),
    Shape(heads=8, kv_heads=1, head_dim=128, block_size=32),
    Shape(head_dim=96, block_size=32),
    Shape(heads=6, kv_heads=2, dtype=torch.bfloat16, learned_sinks=True),
    Shape(heads=6, kv_heads=2, dtype=torch.bfloat16, float8=True),
]


def _shapes(*rarer: int) -> list[Any]:
    """Give the shapes but for the first; those that `make test` leaves out, by index."""
    return [
        pytest.param(shape, id=str(shape), marks=[pytest.mark.long] if index in rarer else [])
        for index, shape in enumerate(XATTENTION_SHAPES)
        if index
    ]


# Of whole layers; scores and choices are tested on all of them below.
LAYER_SHAPES = _shapes(1, 4)
# Block lists are made by the same kernels, whoever attends.
FA3_SHAPES = _shapes(1, 3, 4)
FEW = [Row(70, 450, SPARSE), Row(130, 130, FULL), Row(5, 700, SPARSE)]
LONG = [
    Row(1, 5000, SPARSE, False),
    Row(1500, 6000, SPARSE),
    Row(130, 8000, SPARSE),
    Row(300, 1300, SPARSE),
]
LONG_SHAPE = Shape(heads=8, head_dim=128, dtype=torch.bfloat16, sink_tokens=128, window_tokens=1024)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", XATTENTION_ROWS)
def test_xattention(name: str, device: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(tmp_path_factory, XATTENTION_ROWS[name], Shape(), device, XATTENTION)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", LAYER_SHAPES)
def test_xattention_shapes(
    shape: Shape, device: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(tmp_path_factory, FEW, shape, device, XATTENTION)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES[1:])
def test_xattention_long(device: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """More blocks than one tile of scores holds, and queries of many blocks."""
    pattern = {"sparse_pattern": "xattention", "pattern_options": {"threshold": 0.3}}
    check(tmp_path_factory, LONG, LONG_SHAPE, device, pattern)


@pytest.mark.usefixtures("_emulated_fa3")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", XATTENTION_ROWS)
def test_xattention_with_fa3(
    name: str, device: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(tmp_path_factory, XATTENTION_ROWS[name], Shape(), device, XATTENTION, "fa3")


@pytest.mark.usefixtures("_emulated_fa3")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", FA3_SHAPES)
def test_xattention_shapes_with_fa3(
    shape: Shape, device: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(tmp_path_factory, FEW, shape, device, XATTENTION, "fa3")


def slices_of_one_kv_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_rows, "SLICE_NBYTES", 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [pytest.param(2, marks=pytest.mark.long), 5])
def test_xattention_in_slices(
    index: int,
    device: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where all heads' lists would take too much."""
    slices_of_one_kv_head(monkeypatch)
    check(tmp_path_factory, FEW, XATTENTION_SHAPES[index], device, XATTENTION)


@pytest.mark.usefixtures("_emulated_fa3")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [2, pytest.param(5, marks=pytest.mark.long)])
def test_xattention_in_slices_with_fa3(
    index: int,
    device: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slices_of_one_kv_head(monkeypatch)
    check(tmp_path_factory, FEW, XATTENTION_SHAPES[index], device, XATTENTION, "fa3")


@pytest.mark.usefixtures("_emulated_fa3")
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES[1:])
def test_xattention_long_with_fa3(device: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    pattern = {"sparse_pattern": "xattention", "pattern_options": {"threshold": 0.3}}
    check(tmp_path_factory, LONG, LONG_SHAPE, device, pattern, "fa3")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "threshold", "stride"),
    [
        *((shape, 0.6, 16) for shape in XATTENTION_SHAPES if not shape.learned_sinks),
        (Shape(), 0.3, 8),
        (Shape(), 0.9, 16),
        (Shape(), 1.0, 16),
    ],
    ids=str,
)
def test_blocks_chosen(shape: Shape, threshold: float, stride: int, device: str) -> None:
    """Against tests/helpers/oracle/block_choice.py; rows that are switched off have no list."""
    rows = [Row(70, 450), Row(9, 300), Row(200, 801), Row(1, 257)]
    active = [True, False, True, True]
    batch = make_batch(rows, shape, device)
    scale = 6 * batch.scale  # so that blocks differ widely in mass
    group = tasks_a_program(shape.heads // shape.kv_heads, batch.query.element_size(), stride)
    packed = pack_block_tasks(
        np.array([row.seq_len - row.query_len for row in rows]),
        np.array([row.query_len for row in rows]),
        np.ones(len(rows), bool),
        group,
    )
    tasks = torch.from_numpy(packed.tasks).to(device)
    entries, block_rows = packed.num_entries, 128 // stride
    lse = torch.full((shape.heads, entries * block_rows), float("nan"), device=device)
    chosen = torch.full((shape.heads, entries), -7, dtype=torch.int32, device=device)
    counts = torch.full((shape.heads, len(tasks)), -7, dtype=torch.int32, device=device)
    seqused_q, sizes = batch.seqused_q(active), {"most_blocks": packed.most_blocks}
    score_blocks(
        batch.query, batch.cache,
        PagedRows(batch.block_table, None, batch.query_start_loc, batch.seq_lens, seqused_q),
        tasks, lse, scale=scale, stride=stride, **sizes,
    )  # fmt: skip
    choose_blocks(
        lse, tasks, seqused_q, batch.seq_lens, chosen, counts, threshold=threshold, stride=stride,
        **sizes,
    )  # fmt: skip
    heads = range(shape.heads)
    for index, row in enumerate(rows):
        key = gather_pages(batch.meant.keys, batch.block_table[index], row.seq_len).float().cpu()
        query = batch.query[batch.tokens_of(index)].float().cpu()
        mine = [task for task in range(len(tasks)) if packed.tasks[task, 0] == index]
        assert len(mine) == (row.seq_len - 1) // 128 - (row.seq_len - row.query_len) // 128 + 1
        for head in heads if active[index] else []:
            expected, _ = block_choice.choose_blocks(
                query[:, head],
                key[:, head * shape.kv_heads // shape.heads],
                scale,
                stride,
                threshold,
            )
            for task in mine:
                _, block, entry = packed.tasks[task]
                found = chosen[head, entry : entry + counts[head, task]].tolist()
                assert found == expected[block].nonzero().flatten().tolist(), (index, head, block)
        if not active[index]:
            assert (counts[:, mine] == -7).all()


@pytest.mark.parametrize("has_fa3", [False, True])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("slice_nbytes", [16 << 20, 256 << 20])
def test_memory_is_bounded_before_it_is_needed(
    slice_nbytes: int, stride: int, has_fa3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt's last chunk at the longest context, or one query each of many such prompts."""
    monkeypatch.setattr(fa3, "is_available", lambda: has_fa3)
    monkeypatch.setattr(block_rows, "SLICE_NBYTES", slice_nbytes)
    tokens, length, heads = 300, 20_000, 12
    pattern = make_pattern("xattention", 32, 128, {"stride": stride})
    query = torch.empty(tokens, heads, 64, dtype=torch.float16)
    keys = torch.empty(1, 16, heads, 64, dtype=torch.float16)
    call = SimpleNamespace(query=query, cache=KVCache(keys, keys), float8=None)
    reserved = prefill_nbytes(pattern, heads, tokens, length, 2 * 64)
    for rows in (1, tokens):
        lengths = [np.full(rows, n) for n in (length, length - tokens // rows, tokens // rows)]
        step = Batch(tuple(map(str, range(rows))), *lengths, np.ones(rows, bool))
        buffers = plan_batch(pattern, step, torch.device("cpu"))._make_buffers(call, has_fa3)
        taken = buffers.lse.nbytes + buffers.chosen.nbytes
        taken += sum(buffer.nbytes for buffer in buffers.rows or ())
        assert taken <= reserved
        assert buffers.counts.nbytes < reserved / 100
    assert taken > reserved / 2


def test_memory_is_taken_before_the_cache_is_sized(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sizes of the model and of a step that vLLM's configuration gives."""
    from flux_vllm.attention_backend.cuda import memory
    from tests.helpers.cuda_backend import MAX_LEN, _runtime, engine_config

    monkeypatch.setattr(fa3, "is_available", lambda: True)
    shape = Shape(heads=6, kv_heads=2, head_dim=128)
    config = engine_config(tmp_path_factory.mktemp("model"), shape)
    layers = [SimpleNamespace(num_kv_heads=2, head_size=128)]
    monkeypatch.setattr(memory, "bound_layers", lambda *_: layers)
    spec = SimpleNamespace(block_size=shape.block_size)
    groups = [SimpleNamespace(layer_names=["layers.0"], kv_cache_spec=spec)]
    runtime = _runtime(shape, "fa3", torch.device("cpu"), **XATTENTION)
    tokens = config.scheduler_config.max_num_batched_tokens
    stated = prefill_nbytes(runtime.pattern, 6, tokens, MAX_LEN, 2 * 128)
    total = memory.fixed_nbytes(runtime, config, groups)
    with monkeypatch.context() as float8:
        float8.setattr(config.cache_config, "cache_dtype", "fp8")
        assert memory.fixed_nbytes(runtime, config, groups) - total == tokens * 6 * 128
        full = SimpleNamespace(config=FluxConfig(policy="full"))
        assert memory.fixed_nbytes(full, config, groups) == 0
    monkeypatch.setattr(memory, "prefill_nbytes", lambda *_: 0)
    assert memory.fixed_nbytes(runtime, config, groups) == total - stated < total


@pytest.mark.parametrize("is_warmup", [True, False], ids=["warm-up", "request"])
@pytest.mark.parametrize("device", DEVICES)
def test_warm_up_asks_a_fixed_policys_pattern_too(
    device: str, is_warmup: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A refusal, and the compiling of kernels, must not wait for the first long prompt."""
    from tests.helpers.cuda_backend import LAYERS, BackendWorker

    batch = make_batch([Row(4, 4, SPARSE)], Shape(), device)
    worker = BackendWorker(tmp_path_factory.getbasetemp(), batch, "triton", **XATTENTION)
    worker.runtime.fixed_routes = [SPARSE, *[FULL] * (LAYERS - 1)]
    one = [np.array([n]) for n in (4, 0, 4)]
    context = Batch(("_warmup_0_",), *one, np.array([True]), is_warmup)
    step = worker.builder._plan_passes(worker.builder._group, worker.runtime, context)
    if not is_warmup:
        assert step is None
        return
    assert step.sparse_prefill is not None
    assert step.passes.sparse == step.passes.full == [True] * LAYERS
