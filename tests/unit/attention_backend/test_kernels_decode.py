"""Decode views and Triton decode against the float32 oracle: mixed routes, padding, stale tables.

Views: the oracle's list of kept blocks. Attention: the oracle's mask with edges widened to blocks.
"""

import pytest
import torch

from flux_vllm.attention_backend.kernels.decode_views import (
    NO_REQUEST,
    GroupTables,
    LayerViews,
    RoutedColumns,
    StepRows,
    ViewSizes,
    write_views,
)
from flux_vllm.attention_backend.kernels.paged import PagedRows
from flux_vllm.attention_backend.kernels.triton_decode import (
    DecodeWorkspace,
    attend_decode,
    choose_num_splits,
    decode_workspace,
    most_shares,
)
from tests.helpers.oracle import naive
from tests.unit.attention_backend.test_kernels_cases import (
    DEVICES,
    FULL,
    SPARSE,
    PagedBatch,
    Row,
    Shape,
    assert_as_exact_as_torch,
    check_rows,
    make_batch,
)

S, W = 20, 24
UNDECIDED = -1


def decode(seq_len: int, route: int, query_len: int = 1) -> Row:
    return Row(query_len, seq_len, route, prefill=False)


AWKWARD = [
    *(decode(n, SPARSE) for n in (1, 15, 16, 17, S + W - 1, S + W, S + W + 1)),
    Row(0, 0),
    *(decode(n, SPARSE) for n in (63, 64, 65, 71, 72, 73, 200)),
    decode(1, FULL),
    decode(150, FULL),
    Row(0, 0),
]
SPECULATIVE = [
    decode(3, SPARSE, 3),
    decode(90, SPARSE, 4),
    decode(90, FULL, 4),
    Row(0, 0),
    decode(66, SPARSE, 2),
    decode(33, FULL),
]
SHAPES = [
    (Shape(), AWKWARD, 1),
    (Shape(), AWKWARD, 4),
    (Shape(dtype=torch.bfloat16), SPECULATIVE, 4),
    (Shape(dtype=torch.float32), SPECULATIVE, 2),
    (Shape(heads=3, kv_heads=3), SPECULATIVE, 2),
    (Shape(heads=9, kv_heads=3, head_dim=96), SPECULATIVE, 2),
    (Shape(heads=8, kv_heads=1, head_dim=128), SPECULATIVE, 4),
    (Shape(heads=2, kv_heads=1, head_dim=256), SPECULATIVE, 2),
    (Shape(block_size=64), SPECULATIVE, 2),
    (Shape(block_size=48, sink_tokens=0, window_tokens=1), SPECULATIVE, 2),
]
IDS = [f"{shape}-R{len(rows)}-P{splits}" for shape, rows, splits in SHAPES]


class Views:
    """The buffers of `write_views`, poisoned, for one layer whose route is the row's."""

    def __init__(self, batch: PagedBatch, layers: int = 1, spare_rows: int = 2) -> None:
        device = batch.query.device
        rows, width = batch.block_table.shape
        self.capacity = rows + spare_rows
        poison = int(batch.block_table[0, -1])

        def buffer(*shape: int) -> torch.Tensor:
            return torch.full(shape, poison, dtype=torch.int32, device=device)

        self.table2 = buffer(2 * self.capacity, width)
        self.per_layer = LayerViews(*(buffer(layers, self.capacity) for _ in range(4)))
        self.kv_batch_idx, self.seqused_k, self.full_seqused_q, self.sparse_seqused_q = (
            self.per_layer
        )
        self.totals = torch.zeros(3, self.capacity, dtype=torch.int64, device=device)

    def write(
        self,
        batch: PagedBatch,
        routes: torch.Tensor,
        layers: list[int],
        is_routed: list[int] | None = None,
    ) -> "Views":
        """Write the views of rows with these routes: [R, layers of the model]."""
        device = batch.query.device
        layout = GroupTables.measure([batch.block_table], [self.table2])
        is_prefill = [row.prefill and row.query_len > 0 for row in batch.rows]
        write_views(
            GroupTables(batch.block_table, self.table2, torch.tensor(layout, device=device)),
            StepRows(
                batch.seq_lens,
                batch.query_start_loc,
                routes.to(device),
                torch.tensor(is_prefill, dtype=torch.int8, device=device)
                if any(is_prefill)
                else None,
            ),
            RoutedColumns(
                torch.tensor(layers, dtype=torch.int32, device=device),
                torch.tensor(is_routed or [1] * len(layers), dtype=torch.int8, device=device),
            ),
            self.per_layer,
            None if any(is_prefill) else self.totals,
            sizes_of(batch.shape),
            width=self.table2.shape[1],
        )
        return self

    def rows_of(self, batch: PagedBatch, seqused_q: torch.Tensor | None = None) -> PagedRows:
        """Return the batch's rows through the first layer's views."""
        rows = len(batch.rows)
        return PagedRows(
            self.table2,
            self.kv_batch_idx[0, :rows],
            batch.query_start_loc,
            self.seqused_k[0, :rows],
            seqused_q,
        )


def sizes_of(shape: Shape) -> ViewSizes:
    reach = shape.sink_tokens + shape.window_tokens
    return ViewSizes(shape.block_size, shape.sink_tokens, shape.window_tokens, reach)


def views_of(batch: PagedBatch) -> Views:
    """Write views of one layer, whose route is the row's."""
    routes = [row.route if row.query_len else NO_REQUEST for row in batch.rows]
    return Views(batch).write(batch, torch.tensor(routes, dtype=torch.int8)[:, None], [0])


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


def run_decode(
    batch: PagedBatch,
    views: Views,
    splits: int,
    workspace: DecodeWorkspace | None = None,
    seqused_q: torch.Tensor | None = None,
    **extra: object,
) -> torch.Tensor:
    out = batch.poisoned_output()
    tokens, heads, head_dim = batch.query.shape
    if workspace is None:
        workspace = decode_workspace(tokens + 3, heads, head_dim, splits, batch.query.device)
    workspace.out.fill_(float("nan"))
    workspace.lse.fill_(float("nan"))
    attend_decode(
        batch.query,
        batch.cache,
        out,
        views.rows_of(batch, seqused_q),
        workspace,
        max_query_len=max(row.query_len for row in batch.rows),
        scale=batch.scale,
        **extra,
    )
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "rows", "splits"), SHAPES, ids=IDS)
def test_attend_decode_matches_the_oracle(
    device: str, shape: Shape, rows: list[Row], splits: int
) -> None:
    batch = make_batch(rows, shape, device)
    out = run_decode(batch, views_of(batch), splits)
    check_rows(batch, out, [True] * len(rows))


@pytest.mark.parametrize("device", DEVICES)
def test_attend_decode_skips_rows(device: str) -> None:
    batch = make_batch(SPECULATIVE, Shape(), device)
    chosen = [True, False, True, True, False, True]
    out = run_decode(batch, views_of(batch), 2, seqused_q=batch.seqused_q(chosen))
    check_rows(batch, out, chosen)


def test_choose_num_splits_fills_the_gpu_and_no_more() -> None:
    assert choose_num_splits(1, 8, 132) == 64
    assert choose_num_splits(16, 8, 132) == 8
    assert choose_num_splits(1024, 8, 132) == 1


def test_most_shares_levels_off() -> None:
    """One workspace is enough for all batches: many rows are split in fewer shares each."""
    for rows in (1, 2, 16, 66):
        splits = [choose_num_splits(n, 8, 132) for n in range(1, rows + 1)]
        assert most_shares(rows, 8, 132) == max(n * p for n, p in enumerate(splits, 1) if p > 1)
    assert most_shares(256, 8, 132) == most_shares(4096, 8, 132) == 130
    assert most_shares(64, 8, 2) == 0  # one share fills the GPU


@pytest.mark.parametrize("tokens", [1, 5, 6, 11, 100])
def test_fit_halves_the_splits_of_a_batch_too_large(tokens: int) -> None:
    workspace = decode_workspace(20, 3, 16, 2, torch.device("cpu"))
    splits = workspace.fit(8, tokens, 3, 16).num_splits
    assert splits == {1: 8, 5: 8, 6: 4, 11: 2, 100: 1}[tokens]
    assert splits == 1 or tokens * splits <= 40


@pytest.mark.parametrize("device", DEVICES)
def test_attend_decode_in_one_share_needs_no_workspace(device: str) -> None:
    batch = make_batch(SPECULATIVE, Shape(), device)
    out = run_decode(batch, views_of(batch), 1, decode_workspace(0, 1, 1, 1, batch.query.device))
    check_rows(batch, out, [True] * len(batch.rows))


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize(
    ("shape", "longest"),
    [
        (Shape(32, 8, 128, 16, torch.bfloat16, 128, 2048), 70_000),
        (Shape(16, 1, 64, 128, torch.float16, 100, 1000), 9_000),
        (Shape(4, 4, 256, 32, torch.bfloat16, 64, 512), 9_000),
    ],
    ids=["N32-K8-H128-70000", "N16-K1-H64-9000", "N4-K4-H256-9000"],
)
def test_attend_decode_long(device: str, shape: Shape, longest: int) -> None:
    rows = [
        decode(longest, SPARSE),
        decode(longest, FULL, 3),
        decode(2177, SPARSE, 4),
        Row(0, 0),
        decode(1, FULL),
        decode(longest // 2 - 1, SPARSE, 2),
    ]
    batch = make_batch(rows, shape, device)
    views = views_of(batch)
    exact, low = ([], [])
    for index, row in enumerate(rows):
        if not row.query_len:
            continue
        keys = int(views.seqused_k[0, index])
        table = views.table2[int(views.kv_batch_idx[0, index])]
        key, value = (
            naive.gather_pages(cache, table, keys) for cache in (batch.key_cache, batch.value_cache)
        )
        mask = torch.ones(row.query_len, keys, dtype=torch.bool, device=device)
        mask = mask.tril(keys - row.query_len)
        query = batch.query[batch.tokens_of(index)]
        exact.append(naive.attend(query, key, value, mask, batch.scale))
        low.append(naive.attend(query, key, value, mask, batch.scale, shape.dtype))
    for splits in (1, 8, 64):
        out = run_decode(batch, views, splits)
        assert_as_exact_as_torch(out, torch.cat(exact), torch.cat(low), f"{splits} splits")
