"""Decode rows for the kernel tests, and the views that the package writes of them."""

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
from tests.unit.attention_backend.test_kernels_cases import (
    FULL,
    SPARSE,
    PagedBatch,
    Row,
    Shape,
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
    (Shape(learned_sinks=True), AWKWARD, 1),
    (Shape(heads=16, kv_heads=2, dtype=torch.bfloat16, learned_sinks=True), AWKWARD, 4),
    (Shape(heads=9, kv_heads=3, dtype=torch.float32, learned_sinks=True), SPECULATIVE, 4),
    (Shape(float8=True), AWKWARD, 4),
    (Shape(heads=8, kv_heads=1, head_dim=128, dtype=torch.bfloat16, float8=True), SPECULATIVE, 2),
    (Shape(heads=9, kv_heads=3, head_dim=96, learned_sinks=True, float8=True), SPECULATIVE, 1),
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
        sparse_from: list[int] | None = None,
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
                None
                if sparse_from is None
                else torch.tensor(sparse_from, dtype=torch.int32, device=device),
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
