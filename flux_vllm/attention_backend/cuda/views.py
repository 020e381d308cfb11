"""The CUDA backend's persistent buffers: what a captured graph reads, rewritten every step.

Dimension legend: C capacity in rows, M table width, L routed layers of the KV cache group.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from flux_vllm.attention_backend.kernels.decode_plan import (
    CallShape,
    plan_width,
    write_decode_plans,
)
from flux_vllm.attention_backend.kernels.decode_views import write_decode_views
from flux_vllm.transfer import to_device


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What the host knows of a batch's rows."""

    slots: np.ndarray
    """[R] int64: route-table slots, -1 for rows that stand for no request."""
    is_prefill: np.ndarray
    """[R] bool."""


class LayerRows(NamedTuple):
    """One layer's part of the views, each [R] int32: see `write_decode_views`."""

    kv_batch_idx: torch.Tensor
    seqused_k: torch.Tensor
    full_seqused_q: torch.Tensor
    sparse_seqused_q: torch.Tensor


class ViewBuffers:
    """Views of one KV cache group, allocated once.

    Args:
        capacity: C, most rows of a batch, padding included.
        width: M, entries of a row of vLLM's block table.
        layer_columns: the L layers' columns in the route table.
        block_size: tokens a block.
        sink_tokens: of SPARSE layers.
        window_tokens: of SPARSE layers.
        sparse_beyond_tokens: of the sparse pattern, its reach.
        device: of the KV cache.
    """

    def __init__(
        self,
        capacity: int,
        width: int,
        layer_columns: list[int],
        block_size: int,
        sink_tokens: int,
        window_tokens: int,
        sparse_beyond_tokens: int,
        device: torch.device,
    ) -> None:
        layers = len(layer_columns)
        self.capacity = capacity
        self._sizes = {
            "block_size": block_size,
            "sink_tokens": sink_tokens,
            "window_tokens": window_tokens,
            "sparse_beyond_tokens": sparse_beyond_tokens,
        }

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.table = zeros(2 * capacity, width)
        """[2C, M]: real rows from 0, compacted rows from C."""
        self.compact_lens = zeros(capacity)
        self.kv_batch_idx = zeros(layers, capacity)
        self.seqused_k = zeros(layers, capacity)
        self.full_seqused_q = zeros(layers, capacity)
        self.sparse_seqused_q = zeros(layers, capacity)
        self._plans = zeros(layers, plan_width(capacity))
        self._columns = torch.tensor(layer_columns, dtype=torch.int32, device=device)
        self._slots = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self._is_prefill = zeros(capacity, dtype=torch.int8)
        self._uploaded: tuple[bytes, bytes] = (b"", b"")
        self._uploaded_rows = 0
        self._layer_rows: list[LayerRows] = []
        self._cut_rows = -1

    @staticmethod
    def nbytes(capacity: int, width: int, layers: int) -> int:
        """Return the memory that such buffers take."""
        views = 4 * capacity * (2 * width + 4 * layers + 1) + 9 * capacity
        return views + 4 * layers * plan_width(capacity)

    def write(
        self,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        facts: RowFacts | None,
        routes: torch.Tensor,
    ) -> None:
        """Write a step's views.

        Args:
            block_table: [>= R, M] int32.
            seq_lens: [R] int32, 0 for padding rows.
            query_start_loc: [R + 1] int32.
            facts: of the first rows, the others are padding; None for a dummy batch, whose rows
                all attend FULL.
            routes: [slots, layers of the model] int8.

        Host sync: none.
        """
        self._upload(facts)
        write_decode_views(
            block_table,
            seq_lens,
            query_start_loc,
            self._slots,
            self._is_prefill,
            routes,
            self._columns,
            self.table,
            self.compact_lens,
            self.kv_batch_idx,
            self.seqused_k,
            self.full_seqused_q,
            self.sparse_seqused_q,
            **self._sizes,
        )

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
            self.seqused_k,
            query_start_loc,
            self._plans,
            shape,
            max_query_len=max_query_len,
            num_splits=num_splits,
        )

    def layer_rows(self, rows: int) -> list[LayerRows]:
        """Return each layer's part of a batch of `rows` rows, cut once while their number stays."""
        if rows != self._cut_rows:
            buffers = LayerRows(
                self.kv_batch_idx, self.seqused_k, self.full_seqused_q, self.sparse_seqused_q
            )
            by_buffer = (buffer[:, :rows].unbind() for buffer in buffers)
            self._layer_rows = [LayerRows(*parts) for parts in zip(*by_buffer, strict=True)]
            self._cut_rows = rows
        return self._layer_rows

    def _upload(self, facts: RowFacts | None) -> None:
        """Bring the rows' slots to the device, unless they are those of the last step."""
        none = np.empty(0, dtype=np.int64)
        slots = none if facts is None else facts.slots
        is_prefill = none if facts is None else facts.is_prefill
        key = (slots.tobytes(), is_prefill.tobytes())
        if key == self._uploaded:
            return
        rows = len(slots)
        padded = np.full((2, max(rows, self._uploaded_rows)), [[-1], [0]], dtype=np.int64)
        padded[0, :rows] = slots
        padded[1, :rows] = is_prefill
        values = to_device(padded, self._slots.device)
        self._slots[: padded.shape[1]] = values[0]
        self._is_prefill[: padded.shape[1]] = values[1]
        self._uploaded, self._uploaded_rows = key, rows
