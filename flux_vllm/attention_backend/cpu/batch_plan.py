"""One batch of the CPU backend: which rows go where, layer by layer."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from flux_vllm.attention_backend.cpu.patterns import plan_chunk
from flux_vllm.attention_backend.cpu.prefill import Chunk, ChunkPrefill
from flux_vllm.attention_backend.cpu.views import compact_view
from flux_vllm.router.route import Route
from flux_vllm.routing.runtime import FluxRuntime

if TYPE_CHECKING:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer's rows are attended."""

    kernel: "CPUAttentionMetadata | None"
    """For vLLM's kernel: FULL rows, and SPARSE decode rows through compacted tables."""
    tokens: torch.Tensor | None
    """int64: tokens of the kernel's rows; None for all of the batch."""
    sparse_prefills: tuple[tuple[slice, ChunkPrefill], ...]
    """Tokens and plan of each row that is prefilled under SPARSE."""


class MetadataBuilder(Protocol):
    """What a plan needs of the builder that makes vLLM's metadata of one KV cache group."""

    block_size: int

    def schedule(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """Make vLLM's kernel a schedule for some rows: [R] keys, [R + 1] where queries begin."""


class CpuRoutes:
    """The routes' side of one batch's attention metadata.

    Layers with the same routes share a plan, so a step costs as many plans as it has patterns.

    Args:
        runtime: of this worker; its current batch is this one.
        metadata: vLLM's for the batch; lives as long as this.
        builder: of this KV cache group.
    """

    def __init__(
        self,
        runtime: FluxRuntime,
        metadata: "CPUAttentionMetadata",
        builder: MetadataBuilder,
    ) -> None:
        assert runtime.current is not None
        self._runtime = runtime
        self._current = runtime.current
        self._metadata = metadata
        self._builder = builder
        batch = self._current.batch
        self._starts = np.concatenate([[0], np.cumsum(batch.scheduled)])
        # Up to so many tokens both routes attend to the same keys, so the kernel may do either.
        same = np.where(
            batch.is_prefill,
            runtime.pattern.reach,
            np.maximum(
                runtime.sink_tokens + runtime.window_tokens,
                batch.prompt_lens + runtime.full_decode_tokens,
            ),
        )
        self._routes_differ = batch.computed + batch.scheduled > same
        self._view = compact_view(
            metadata.block_table,
            metadata.seq_lens,
            metadata.query_start_loc.diff(),
            builder.block_size,
            runtime.sink_tokens,
            runtime.window_tokens,
        )
        self._plans: dict[bytes, LayerPlan] = {}
        self._prefills: dict[int, ChunkPrefill] = {}

    def plan(self, layer: int) -> LayerPlan:
        """Split the rows of one layer by their routes."""
        routes = self._runtime.table.routes[:, layer].numpy()[self._current.slots]
        sparse = routes == Route.SPARSE
        if self._runtime.config.sparse_prefill:
            sparse |= (routes == Route.FULL) & self._current.batch.is_prefill
        sparse &= self._routes_differ
        key = sparse.tobytes()
        if key not in self._plans:
            self._plans[key] = self._make_plan(sparse)
        return self._plans[key]

    def _make_plan(self, sparse: np.ndarray) -> LayerPlan:
        if not sparse.any():
            return LayerPlan(self._metadata, None, ())
        is_prefill = self._current.batch.is_prefill
        apart = np.flatnonzero(sparse & is_prefill)
        prefills = tuple(
            (slice(self._starts[row], self._starts[row + 1]), self._prefill(row)) for row in apart
        )
        kernel_rows = np.flatnonzero(~(sparse & is_prefill))
        if not len(kernel_rows):
            return LayerPlan(None, None, prefills)
        tokens = None
        if len(apart):
            spans = [np.arange(self._starts[row], self._starts[row + 1]) for row in kernel_rows]
            tokens = torch.from_numpy(np.concatenate(spans))
        return LayerPlan(self._kernel_metadata(kernel_rows, sparse), tokens, prefills)

    def _kernel_metadata(self, rows: np.ndarray, sparse: np.ndarray) -> "CPUAttentionMetadata":
        """Make the kernel's metadata for some rows, compacting the SPARSE ones among them."""
        index = torch.from_numpy(rows)
        compacted = torch.from_numpy(sparse[rows])
        full = self._metadata
        table = torch.where(
            compacted[:, None], self._view.block_table[index], full.block_table[index]
        )
        seq_lens = torch.where(compacted, self._view.seq_lens[index], full.seq_lens[index])
        query_lens = torch.from_numpy(self._current.batch.scheduled[rows])
        query_start_loc = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).int()
        return replace(
            full,
            num_actual_tokens=int(query_lens.sum()),
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens.max()),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=table,
            scheduler_metadata=self._builder.schedule(seq_lens, query_start_loc),
        )

    def _prefill(self, row: int) -> ChunkPrefill:
        if row not in self._prefills:
            batch = self._current.batch
            chunk = Chunk(
                int(batch.computed[row]),
                int(batch.scheduled[row]),
                int(batch.prompt_lens[row]),
                self._metadata.block_table[row],
                self._builder.block_size,
            )
            self._prefills[row] = plan_chunk(self._runtime.pattern, chunk)
        return self._prefills[row]
