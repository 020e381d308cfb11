"""Lists of key blocks as rows of one FlashAttention-3 call: views, tables, and what they attend to.

Oracle: `tests.helpers.oracle.naive` under the mask that the lists spell out; tables are
held to a plain construction. Without a GPU the operator is tests/helpers/fa3_emulation.py over the
very same views; on a Hopper GPU it is vLLM's. Triton's kernel attends over the same lists.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from flux_vllm.attention_backend.kernels import block_rows, fa3
from flux_vllm.attention_backend.kernels.block_lists import BlockLists
from flux_vllm.attention_backend.kernels.block_rows import BlockRows
from flux_vllm.attention_backend.kernels.block_sparse import attend_blocks
from flux_vllm.attention_backend.kernels.block_tasks import pack_block_tasks
from flux_vllm.attention_backend.kernels.head_pages import head_pages
from tests.helpers import fa3_emulation
from tests.unit.attention_backend.test_kernels_cases import (
    DEVICES,
    SPARSE,
    PagedBatch,
    Row,
    Shape,
    check_rows,
    make_batch,
)

pytestmark = pytest.mark.vllm

BF16 = torch.bfloat16
# Chunk edges within blocks and on them, one query, a row of one block; decode and padding beside.
ROWS = [
    Row(70, 450, SPARSE),
    Row(9, 300, SPARSE),
    Row(1, 92, SPARSE, False),
    Row(200, 801, SPARSE),
    Row(0, 0),
    Row(1, 257, SPARSE),
    Row(128, 640, SPARSE),
    Row(100, 100, SPARSE),
    Row(17, 384, SPARSE),
]
ACTIVE = [True, False, False, True, False, True, True, True, True]
SHAPES = [
    Shape(),
    Shape(heads=3, kv_heads=3, dtype=BF16),
    Shape(heads=6, kv_heads=2, head_dim=128, block_size=64, dtype=BF16),
    Shape(heads=4, kv_heads=1, head_dim=96, block_size=48),
    Shape(heads=4, kv_heads=2, head_dim=128, block_size=128, dtype=BF16),
    Shape(heads=2, kv_heads=2, head_dim=256, block_size=256, dtype=BF16),
    Shape(heads=6, kv_heads=2, dtype=BF16, learned_sinks=True),
    Shape(heads=4, kv_heads=2, head_dim=96, block_size=48, dtype=BF16, float8=True),
]


def make_lists(
    batch: PagedBatch, active: list[bool], density: float
) -> tuple[BlockLists, np.ndarray, list[torch.Tensor]]:
    """Draw lists. Returns: them, the tasks, and of each row its blocks kept [N, blocks, blocks]."""
    generator = torch.Generator().manual_seed(1)
    device, heads = batch.query.device, batch.shape.heads
    packed = pack_block_tasks(
        np.array([row.seq_len - row.query_len for row in batch.rows]),
        np.array([row.query_len for row in batch.rows]),
        np.array([row.prefill for row in batch.rows]),
        4,
    )
    widths = [-(-row.seq_len // 128) for row in batch.rows]
    kept = [torch.rand(heads, n, n, generator=generator) < density for n in widths]
    chosen = torch.full((heads, packed.num_entries), -7, dtype=torch.int32)
    counts = torch.full((heads, len(packed.tasks)), -7, dtype=torch.int32)
    for task, (row, block, entry) in enumerate(packed.tasks.tolist()):
        if row < 0:
            continue
        of_task = kept[row][:, block]
        of_task[:, 0] = of_task[:, block] = True
        of_task[:, block + 1 :] = False
        for head in range(heads) if active[row] else ():
            listed = of_task[head].nonzero().flatten()
            chosen[head, entry : entry + len(listed)] = listed
            counts[head, task] = len(listed)
    lists = BlockLists(
        batch.block_table,
        batch.query_start_loc,
        batch.seqused_q(active),
        batch.seq_lens,
        torch.from_numpy(packed.tasks).to(device),
        chosen.to(device),
        counts.to(device),
    )
    return lists, packed.tasks, kept


def visible_by(
    kept: list[torch.Tensor], batch: PagedBatch
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Make the mask of kept blocks; rows are told apart by their lengths."""
    by_length = {row.seq_len: blocks for row, blocks in zip(batch.rows, kept, strict=True)}

    def visible(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        column = torch.arange(len(key), device=key.device)
        position = column[len(key) - len(query) :]
        seen = by_length[len(key)].to(key.device)[:, position // 128][:, :, column // 128]
        return seen & (column <= position[:, None])

    return visible


def make_rows(batch: PagedBatch, tasks: np.ndarray) -> BlockRows:
    most_blocks = max(-(-row.seq_len // 128) for row in batch.rows)
    sizes = (batch.shape.block_size, most_blocks)
    dtype = torch.float8_e4m3fn if batch.shape.float8 else None
    rows = block_rows.make_block_rows(tasks, batch.query, *sizes, dtype)
    rows.table.fill_(-7)
    return rows


def use_fa3_of(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(fa3, "attend", fa3_emulation.attend)
    elif not fa3.is_available():
        pytest.skip("needs a Hopper GPU and vLLM's FA3")


def slices_of(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_rows, "heads_a_slice", lambda num_heads, *_: min(num_heads, heads))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [32, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_block_rows(
    shape: Shape, heads: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one slice of heads, and in slices of two, of which the last may be one."""
    use_fa3_of(device, monkeypatch)
    slices_of(heads, monkeypatch)
    batch = make_batch(ROWS, shape, device)
    batch.by_fa3 = device == "cuda"
    lists, tasks, kept = make_lists(batch, ACTIVE, 0.4)
    batch.mask = visible_by(kept, batch)
    out, rows = batch.poisoned_output(), make_rows(batch, tasks)
    caches = (batch.query, batch.cache, out)
    options = {"scale": batch.scale, "sink_logits": batch.sink_logits, "float8": batch.float8}
    block_rows.attend_block_rows(*caches, lists, rows, **options)
    check_rows(batch, out, ACTIVE)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.05, 0.3])
def test_attend_block_rows_long(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than one program of FlashAttention-3's scheduler plans, whole blocks and ends."""
    use_fa3_of("cuda", monkeypatch)
    shape = Shape(heads=32, kv_heads=8, head_dim=128, dtype=BF16)
    batch = make_batch([Row(4500, 9000, SPARSE), Row(1, 700, SPARSE)], shape, "cuda")
    lists, tasks, kept = make_lists(batch, [True, True], density)
    batch.mask = visible_by(kept, batch)
    out, rows = batch.poisoned_output(), make_rows(batch, tasks)
    assert len(rows.num_keys) > 992
    caches = (batch.query, batch.cache, out)
    block_rows.attend_block_rows(*caches, lists, rows, scale=batch.scale)
    check_rows(batch, out, [True, True])


@pytest.mark.gpu
def test_rows_switched_by_the_device_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it waits for the device: a capture would not end."""
    use_fa3_of("cuda", monkeypatch)
    batch = make_batch(ROWS, SHAPES[0], "cuda")
    lists, tasks, kept = make_lists(batch, ACTIVE, 0.4)
    batch.mask = visible_by(kept, batch)
    out, rows = batch.poisoned_output(), make_rows(batch, tasks)
    caches = (batch.query, batch.cache, out)
    block_rows.attend_block_rows(*caches, lists, rows, scale=batch.scale)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_rows.attend_block_rows(*caches, lists, rows, scale=batch.scale)
    fewer = [active and index != 3 for index, active in enumerate(ACTIVE)]
    for active in (fewer, ACTIVE):
        out.fill_(float("nan"))
        lists.seqused_q.copy_(batch.seqused_q(active))
        graph.replay()
        check_rows(batch, out, active)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [*SHAPES[:5], *SHAPES[6:], Shape(head_dim=96, block_size=32)], ids=str
)
def test_attend_blocks(shape: Shape, device: str) -> None:
    """Triton's kernel, over the same lists."""
    batch = make_batch(ROWS, shape, device)
    lists, _, kept = make_lists(batch, ACTIVE, 0.4)
    batch.mask = visible_by(kept, batch)
    out = batch.poisoned_output()
    caches = (batch.query, batch.cache, out)
    attend_blocks(*caches, lists, scale=batch.scale, sink_logits=batch.sink_logits)
    check_rows(batch, out, ACTIVE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tables(shape: Shape, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry by entry, by the address of the keys they name; nothing else is written."""
    slices_of(2, monkeypatch)
    batch = make_batch(ROWS, shape, device)
    lists, tasks, _ = make_lists(batch, ACTIVE, 0.4)
    rows, pages = make_rows(batch, tasks), head_pages(batch.key_cache, batch.value_cache)
    assert sorted(rows.order.tolist()) == (tasks[:, 0] >= 0).nonzero()[0].tolist()
    blocks_in_order = tasks[rows.order.cpu().numpy(), 1]
    assert (np.diff(blocks_in_order) <= 0).all()
    page_tokens, size = pages.keys.shape[1], shape.block_size
    first = shape.heads - 1  # a slice of one head, less than the rows have room for
    block_rows.write_tables(
        batch.key_cache, pages, lists, rows, range(first, shape.heads), shape.heads
    )
    number = len(rows.order)
    assert (rows.table[number:] == -7).all()
    for index, task in enumerate(rows.order.tolist()):
        request, block, entry = tasks[task].tolist()
        row = batch.rows[request]
        lengths = (int(rows.num_queries[index]), int(rows.num_keys[index]))
        if not ACTIVE[request]:
            assert lengths == (0, 0)
            assert (rows.table[index] == -7).all()
            continue
        end = min((block + 1) * 128, row.seq_len)
        chosen = lists.chosen[first, entry : entry + int(lists.counts[first, task])].tolist()
        held = [b * 128 + t for b in chosen for t in range(0, 128, page_tokens)]
        held = [position for position in held if position < end]
        assert lengths[0] == end - max(block * 128, row.seq_len - row.query_len)
        assert lengths[1] == sum(min(128, end - b * 128) for b in chosen)
        assert (rows.table[index, len(held) :] == -7).all()
        for position, page in zip(held, rows.table[index].tolist(), strict=False):
            block_id = int(batch.block_table[request, position // size])
            kv_head = first * shape.kv_heads // shape.heads
            expected = batch.key_cache[block_id, position % size, kv_head]
            assert pages.keys[page, 0, 0].data_ptr() == expected.data_ptr()


def _by_token(blocks: int, size: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    return torch.arange(blocks * size * kv_heads * 2 * head_dim).view(
        blocks, size, kv_heads, 2 * head_dim
    )


def _by_head(blocks: int, size: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    return _by_token(blocks, kv_heads, size, head_dim).transpose(1, 2)


def _padded_blocks(blocks: int, size: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Blocks of two layers in one tensor, as a shared KV cache may have them."""
    return _by_token(2 * blocks, size, kv_heads, head_dim)[1::2]


@pytest.mark.parametrize("layout", [_by_token, _by_head, _padded_blocks])
@pytest.mark.parametrize("sizes", [(5, 16, 3, 8), (3, 48, 2, 16), (2, 256, 4, 8), (4, 128, 1, 8)])
def test_head_pages(layout: Callable[..., torch.Tensor], sizes: tuple[int, ...]) -> None:
    """Every page is the tokens of one KV head that its number says, in any layout of the cache."""
    keys, values = layout(*sizes).split(sizes[3], dim=3)
    pages = head_pages(keys, values)
    tokens = pages.keys.shape[1]
    assert sizes[1] % tokens == 0
    assert 128 % tokens == 0
    for block, part, head in np.ndindex(sizes[0], sizes[1] // tokens, sizes[2]):
        page = block * pages.block_pages + part * pages.part_pages + head * pages.head_pages
        inside = slice(part * tokens, (part + 1) * tokens)
        assert (pages.keys[page, :, 0] == keys[block, inside, head]).all()
        assert (pages.values[page, :, 0] == values[block, inside, head]).all()
    assert page == len(pages.keys) - 1


def test_head_pages_of_one_head_whatever_its_stride() -> None:
    """vLLM may set the stride of a dimension of one; pages do not come to begin there."""
    keys, values = _by_token(4, 16, 1, 8).split(8, dim=3)
    strides = (*keys.stride()[:2], keys.shape[3], 1)
    pages = head_pages(*(cache.as_strided(keys.shape, strides) for cache in (keys, values)))
    assert pages.keys.shape[0] == len(keys)
    assert (pages.values[:, :, 0] == values[:, :, 0]).all()


@pytest.mark.parametrize(
    ("tokens", "length", "heads"), [(8192, 131_072, 32), (8192, 1_048_576, 32), (700, 900, 9)]
)
def test_slices_are_bounded(
    tokens: int, length: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice takes at most 256 MiB, or what one head takes; rows take no more than is stated."""
    tasks, blocks, nbytes = tokens // 128, length // 128, 256
    some = block_rows.heads_a_slice(heads, tasks, blocks, nbytes)
    taken = block_rows.slice_nbytes(some, tasks, blocks, nbytes)
    assert some == heads or taken + block_rows.slice_nbytes(1, tasks, blocks, nbytes) > 256 << 20
    assert some == 1 or taken <= 256 << 20
    monkeypatch.setattr(block_rows, "to_device", lambda a, d: torch.from_numpy(a).to(d))
    packed = np.array([[0, block, 0] for block in range(tasks)] + [[-1, 0, 0]])
    query = torch.empty(1, heads, 128, dtype=BF16, device="meta")
    rows = block_rows.make_block_rows(packed, query, 16, blocks)
    assert rows.heads == some
    assert 0.8 * taken < sum(buffer.nbytes for buffer in rows) <= taken
