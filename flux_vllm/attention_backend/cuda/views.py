"""The CUDA backend's persistent buffers: what a captured graph reads and writes.

The host brings what it alone knows, the rows' routes, when a request comes, goes or is routed, and
then only. All else is written by kernels that run in a step's first layer: inside the graph, where
one is replayed.

Dimension legend: C capacity in rows, M table width, L layers of the views, G KV cache groups.
"""

from collections.abc import Sequence

import numpy as np
import torch

from flux_vllm.attention_backend.kernels.decode_plan import (
    CallShape,
    plan_width,
    write_decode_plans,
)
from flux_vllm.attention_backend.kernels.decode_views import (
    NO_REQUEST,
    GroupTables,
    LayerViews,
    RoutedColumns,
    StepRows,
    ViewSizes,
    write_views,
)
from flux_vllm.routing.decode_counts import DecodeCounts
from flux_vllm.routing.route_table import RouteTable
from flux_vllm.transfer import to_device, upload

_MOST_GROUPS = 64


class GroupViews:
    """The part of one KV cache group.

    Args:
        views: of all groups.
        index: of the group among those.
        first_layer: of the group, among the layers of the views.
    """

    def __init__(self, views: "ViewBuffers", index: int, first_layer: int) -> None:
        self.views = views
        self.index = index
        self.first_layer = first_layer
        self.source: torch.Tensor | None = None
        """vLLM's block table in this step."""
        self.table: torch.Tensor | None = None
        """[2C, M] int32: real rows from 0, compacted rows from C."""

    def begin_step(self, block_table: torch.Tensor) -> None:
        """Take up a step's block table [R, M]; its views are to be written."""
        views, known = self.views, self.source
        self.source = block_table
        if (
            known is None
            or block_table.data_ptr() != known.data_ptr()
            or block_table.stride(0) != known.stride(0)
        ):
            views.lay_out()
        views.is_pending = True


class ViewBuffers:
    """Views of all KV cache groups whose layers are alike, allocated once.

    Args:
        capacity: C, most rows of a batch, padding included.
        num_columns: layers of the model.
        sizes: of the views.
        counts: of the worker.
        device: of the KV cache.
        decodes_fully: whether SPARSE layers decode an answer's first tokens with full attention.
    """

    def __init__(
        self,
        capacity: int,
        num_columns: int,
        sizes: ViewSizes,
        counts: DecodeCounts,
        device: torch.device,
        *,
        decodes_fully: bool = False,
    ) -> None:
        self.capacity = capacity
        self.device = device
        self.is_pending = False
        """Whether the step's views are still to be written."""
        self.plans: torch.Tensor | None = None
        """[L, size]: of a step without prefill rows, what the kernels planned for their calls."""
        self._sizes = sizes
        self._counts = counts
        self._groups: list[GroupViews] = []
        self._columns: list[int] = []
        self._is_routed: list[bool] = []
        self._routes = torch.full(
            (capacity, num_columns), NO_REQUEST, dtype=torch.int8, device=device
        )
        self._sparse_from = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._decodes_fully = decodes_fully
        self._is_prefill = torch.zeros(capacity, dtype=torch.int8, device=device)
        self._layout = torch.zeros(_MOST_GROUPS, 4, dtype=torch.int64, device=device)
        self._tables: GroupTables | None = None
        self._width = 0
        self._known: tuple[np.ndarray | None, int] = (None, -1)
        self._known_rows = 0
        self.layer_views: LayerViews
        """[L, C] each, of all layers, made for the first step."""
        self._layers: RoutedColumns | None = None
        self._cut_rows = -1

    @staticmethod
    def nbytes(capacity: int, widths: Sequence[int], layers: int, num_columns: int) -> int:
        """Return the memory that such buffers take, for groups of these tables' widths."""
        tables = 8 * capacity * sum(widths)
        views = 4 * layers * (4 * capacity + plan_width(capacity))
        return tables + views + capacity * (num_columns + 5) + 32 * _MOST_GROUPS

    def join(self, columns: Sequence[int], is_routed: Sequence[bool]) -> GroupViews:
        """Take up a group's layers, before the first step.

        Args:
            columns: of each layer, its place in the model.
            is_routed: of each layer; the others attend as the model has it.
        """
        assert self._layers is None, "a group came after the first step"
        assert len(self._groups) < _MOST_GROUPS
        group = GroupViews(self, len(self._groups), len(self._columns))
        self._groups.append(group)
        self._columns += columns
        self._is_routed += is_routed
        return group

    def holds(self, columns: Sequence[int]) -> bool:
        """Say whether any of these layers has joined already."""
        return not set(columns).isdisjoint(self._columns)

    def set_rows(self, slots: np.ndarray | None, table: RouteTable) -> None:
        """Bring the rows' routes to the device, unless they are those of the last step.

        Args:
            slots: [R] int64: in the table; None for a dummy batch, whose rows all attend FULL. The
                same array says the same.
            table: of the worker.

        Host sync: none.
        """
        known = (slots, table.version)
        if slots is self._known[0] and (slots is None or known == self._known):
            return
        rows = 0 if slots is None else len(slots)
        if slots is not None and rows:
            index = to_device(slots, self.device)
            torch.index_select(table.routes, 0, index, out=self._routes[:rows])
            if self._decodes_fully:
                torch.index_select(table.sparse_from, 0, index, out=self._sparse_from[:rows])
        if rows < self._known_rows:
            self._routes[rows : self._known_rows] = NO_REQUEST
        self._known, self._known_rows = known, rows

    def set_prefill(self, is_prefill: np.ndarray) -> None:
        """Say which of the first rows compute prompt tokens: [R] bool."""
        upload(is_prefill.astype(np.int8), self._is_prefill[: len(is_prefill)])

    def write(
        self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, has_prefill: bool
    ) -> None:
        """Write the step's views, of all layers; a graph may capture it.

        Args:
            seq_lens: [R] int32, 0 for padding rows.
            query_start_loc: [R + 1] int32.
            has_prefill: whether any row is not a decode row.

        Host sync: none.
        """
        self.is_pending = False
        assert self._layers is not None
        assert self._tables is not None
        write_views(
            self._tables,
            StepRows(
                seq_lens,
                query_start_loc,
                self._routes,
                self._sparse_from if self._decodes_fully else None,
                self._is_prefill if has_prefill else None,
            ),
            self._layers,
            self.layer_views,
            None if has_prefill else self._counts.totals,
            self._sizes,
            width=self._width,
        )
        self.plans = None

    def plan(
        self,
        query_start_loc: torch.Tensor,
        shape: CallShape,
        *,
        max_query_len: int,
        num_splits: int,
    ) -> torch.Tensor | None:
        """Plan FlashAttention-3's decode calls over the views of the step.

        Args:
            query_start_loc: [R + 1] int32.
            shape: of the calls.
            max_query_len: most queries a row has (host).
            num_splits: of the calls.

        Returns: [L, size] int32, as `write_decode_plans`.
        Host sync: none.
        """
        return write_decode_plans(
            self.layer_views.seqused_k,
            query_start_loc,
            self._plans,
            shape,
            max_query_len=max_query_len,
            num_splits=num_splits,
        )

    def layer_rows(self, rows: int) -> list[LayerViews]:
        """Return each layer's part of a batch of `rows` rows, cut once while their number stays."""
        if rows != self._cut_rows:
            by_buffer = (buffer[:, :rows].unbind() for buffer in self.layer_views)
            self._layer_rows = [LayerViews(*parts) for parts in zip(*by_buffer, strict=True)]
            self._cut_rows = rows
        return self._layer_rows

    def _allocate(self) -> None:
        """Make what depends on all layers, which have joined by the first step."""
        layers = len(self._columns)

        def zeros(width: int) -> torch.Tensor:
            return torch.zeros(layers, width, dtype=torch.int32, device=self.device)

        self._layers = RoutedColumns(
            torch.tensor(self._columns, dtype=torch.int32, device=self.device),
            torch.tensor(self._is_routed, dtype=torch.int8, device=self.device),
        )
        self.layer_views = LayerViews(*(zeros(self.capacity) for _ in LayerViews._fields))
        self._plans = zeros(plan_width(self.capacity))

    def lay_out(self) -> None:
        """Say where vLLM's tables lie, which stay there once there is a KV cache."""
        if self._layers is None:
            self._allocate()
        groups = [group for group in self._groups if group.source is not None]
        sources = [group.source for group in groups if group.source is not None]
        self._width = min(table.shape[1] for table in sources)
        for group in groups:
            if group.table is None:
                shape = 2 * self.capacity, self._width
                group.table = torch.zeros(shape, dtype=torch.int32, device=self.device)
        targets = [group.table for group in groups if group.table is not None]
        self._width = min(self._width, *(table.shape[1] for table in targets))
        layout = self._layout[: len(groups)]
        upload(np.array(GroupTables.measure(sources, targets), dtype=np.int64), layout)
        self._tables = GroupTables(sources[0], targets[0], layout)
