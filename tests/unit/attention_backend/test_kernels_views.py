"""Decode views against the oracle's kept blocks: mixed routes, padding, stale tables."""

import pytest
import torch

from flux_vllm.attention_backend.kernels.decode_views import (
    NO_REQUEST,
    GroupTables,
    RoutedColumns,
    StepRows,
    write_views,
)
from tests.helpers.oracle import naive
from tests.unit.attention_backend.decode_rows import (
    AWKWARD,
    SPECULATIVE,
    UNDECIDED,
    S,
    Views,
    W,
    decode,
    sizes_of,
    views_of,
)
from tests.unit.attention_backend.test_kernels_cases import (
    DEVICES,
    FULL,
    SPARSE,
    Row,
    Shape,
    make_batch,
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(block_size=48, sink_tokens=49), Shape(sink_tokens=0)], ids=str
)
def test_write_views_keeps_the_oracles_blocks(device: str, shape: Shape) -> None:
    batch = make_batch([*AWKWARD, *SPECULATIVE], shape, device)
    views = views_of(batch)
    capacity, size = views.capacity, shape.block_size
    for index, row in enumerate(batch.rows):
        blocks = -(-row.seq_len // size)
        assert torch.equal(views.table2[index, :blocks], batch.block_table[index, :blocks])
        first = row.seq_len - row.query_len
        kept = naive.compacted_blocks(
            first, row.seq_len, shape.sink_tokens, shape.window_tokens, size
        )
        compacted = batch.block_table[index, kept]
        assert torch.equal(views.table2[capacity + index, : len(kept)], compacted)
        length = row.seq_len - (blocks - len(kept)) * size
        sparse = row.route == SPARSE and row.query_len > 0
        assert views.kv_batch_idx[0, index] == (capacity + index if sparse else index)
        assert views.seqused_k[0, index] == (length if sparse else row.seq_len)


@pytest.mark.parametrize("device", DEVICES)
def test_write_views_by_layer(device: str) -> None:
    """Prefill rows go to a pass by route, decode rows to a table row; UNDECIDED is FULL."""
    rows = [
        decode(100, FULL),
        Row(7, 90),  # prefill beyond sinks and window
        Row(7, S + W),  # prefill that sees every key under either route
        decode(100, FULL),
        Row(0, 0),
        decode(50, FULL),
    ]
    batch = make_batch(rows, Shape(), device)
    routes = torch.tensor(
        [
            [SPARSE, FULL, SPARSE, UNDECIDED],
            [SPARSE, FULL, UNDECIDED, UNDECIDED],
            [SPARSE, FULL, SPARSE, SPARSE],
            [UNDECIDED, FULL, UNDECIDED, SPARSE],
            [NO_REQUEST] * 4,
            [FULL, SPARSE, SPARSE, SPARSE],
        ],
        dtype=torch.int8,
    )
    views = Views(batch, layers=3)
    views.write(batch, routes, layers=[3, 0, 1])
    c = views.capacity
    rows_used = slice(0, len(rows))
    assert views.kv_batch_idx[:, rows_used].tolist() == [
        [0, 1, 2, c + 3, 4, c + 5],
        [c, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, c + 5],
    ]
    assert views.full_seqused_q[:, rows_used].tolist() == [
        [1, 7, 7, 1, 0, 1],
        [1, 0, 7, 1, 0, 1],
        [1, 7, 7, 1, 0, 1],
    ]
    assert views.sparse_seqused_q[:, rows_used].tolist() == [[0] * 6, [0, 7, 0, 0, 0, 0], [0] * 6]
    assert views.seqused_k[0, 1:3].tolist() == [90, S + W]
    assert not views.totals.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_prefill", [False, True])
def test_write_views_decodes_an_answers_first_tokens_fully(device: str, has_prefill: bool) -> None:
    """Up to `sparse_from` tokens, this step's included, a SPARSE row reads its real row."""
    rows = [decode(100, SPARSE), decode(100, SPARSE, 3), decode(101, SPARSE), decode(100, SPARSE)]
    if has_prefill:
        rows.append(Row(7, 90))
    batch = make_batch(rows, Shape(), device)
    plain, views = Views(batch), Views(batch)
    routes = torch.full((len(rows), 1), SPARSE, dtype=torch.int8)
    plain.write(batch, routes, layers=[0])
    views.write(batch, routes, layers=[0], sparse_from=[100, 100, 100, 0, 1000][: len(rows)])
    c = views.capacity
    expected = [0, 1, c + 2, c + 3] + [4] * has_prefill
    assert views.kv_batch_idx[0, : len(rows)].tolist() == expected
    lengths = plain.seqused_k[0, : len(rows)].tolist()
    assert lengths[0] < 100
    assert lengths[1] < 100
    assert views.seqused_k[0, : len(rows)].tolist() == [100, 100, *lengths[2:]]
    if has_prefill:
        # Whatever decode does later, the prompt is computed under its route.
        assert views.sparse_seqused_q[0, :5].tolist() == [0, 0, 0, 0, 7]
        assert not views.full_seqused_q[0, 4]
        return
    attended, context, _ = views.totals
    assert attended[:2].tolist() == context[:2].tolist() == [100, 98 + 99 + 100]
    assert attended[2:4].tolist() == plain.totals[0, 2:4].tolist()
    assert attended[2] < context[2]


@pytest.mark.parametrize("device", DEVICES)
def test_write_views_of_several_groups(device: str) -> None:
    """Tables of groups lie anywhere, and are as wide as they like beyond the views' width."""
    batch = make_batch(AWKWARD, Shape(), device)
    rows, width = batch.block_table.shape
    sources = [batch.block_table]
    for group in (1, 2):
        wide = torch.full((rows, width + group), 7, dtype=torch.int32, device=device)
        wide[:, :width] = batch.block_table + 1000 * group
        sources.append(wide)
    views = views_of(batch)
    expected = [views.table2 + 1000 * group for group in range(3)]
    written = [views.table2 != int(batch.block_table[0, -1])] * 3
    poison = int(batch.block_table[0, -1])
    targets = [torch.full_like(views.table2, poison) for _ in sources]
    routes = [row.route if row.query_len else NO_REQUEST for row in batch.rows]
    write_views(
        GroupTables(
            sources[0],
            targets[0],
            torch.tensor(GroupTables.measure(sources, targets), device=device),
        ),
        StepRows(
            batch.seq_lens,
            batch.query_start_loc,
            torch.tensor(routes, dtype=torch.int8, device=device)[:, None],
            None,
            None,
        ),
        RoutedColumns(
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.ones(1, dtype=torch.int8, device=device),
        ),
        views.per_layer,
        None,
        sizes_of(batch.shape),
        width=width,
    )
    for target, want, mask in zip(targets, expected, written, strict=True):
        assert torch.equal(target, torch.where(mask, want, poison))


@pytest.mark.parametrize("device", DEVICES)
def test_write_views_counts_what_rows_read(device: str) -> None:
    """Oracle: each query's keys by the kept blocks of `naive`; over steps, by place in the batch.

    Layer 3 has no route and counts nowhere; nor do rows without a request. A row without a route
    counts once however many its layers, and only beyond S + W tokens.
    """
    rows = [
        decode(100, FULL),
        decode(90, FULL, 4),
        decode(S + W, FULL),
        decode(70, FULL),
        Row(0, 0),
    ]
    batch = make_batch(rows, Shape(), device)
    routes = torch.tensor(
        [
            [SPARSE, FULL, SPARSE, UNDECIDED],
            [SPARSE, SPARSE, UNDECIDED, UNDECIDED],
            [UNDECIDED] * 4,
            [NO_REQUEST] * 4,
            [NO_REQUEST] * 4,
        ],
        dtype=torch.int8,
    )
    views = Views(batch, layers=4)
    for _ in range(2):
        views.write(batch, routes, [0, 1, 2, 3], [1, 1, 1, 0])
    attended, context = [0] * 5, [0] * 5
    for index, row in enumerate(rows[:3]):
        first = row.seq_len - row.query_len
        kept = naive.compacted_blocks(first, row.seq_len, S, W, batch.shape.block_size)
        dropped = -(-row.seq_len // batch.shape.block_size) - len(kept)
        for query in range(row.query_len):
            keys = first + query + 1
            context[index] += 3 * keys
            sparse = int((routes[index, :3] == SPARSE).sum())
            attended[index] += 3 * keys - sparse * dropped * batch.shape.block_size
    assert views.totals[:, :5].tolist() == [
        [2 * keys for keys in attended],
        [2 * keys for keys in context],
        [0, 2, 0, 0, 0],
    ]
