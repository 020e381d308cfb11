"""Pooling and routing on the GPU: one KV cache group's query sums, and a step's decisions.

Dimension legend: P prompt rows, G granules of the KV cache, H head dim.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flux_vllm.attention_backend.cuda_views import ViewBuffers
from flux_vllm.attention_backend.kernels.pooling import pool_rows, pooling_workspace
from flux_vllm.attention_backend.kernels.prompt_rows import (
    COLUMNS,
    PooledStep,
    pack_prompt_rows,
    pool_slots,
    update_counts,
)
from flux_vllm.attention_backend.kernels.query_sums import InverseRotary, update_sums
from flux_vllm.attention_backend.kernels.router_mlp import (
    SLICES,
    RouterWeights,
    RouteTables,
    RowSwitch,
    decide_layers,
    decide_routes,
    router_weights,
    router_workspace,
)
from flux_vllm.attention_backend.rotary import RotaryInverse
from flux_vllm.router.features import GRANULE_TOKENS
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.state import to_device
from flux_vllm.runtime import ActiveStep, FluxRuntime

if TYPE_CHECKING:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    from flux_vllm.attention_backend.binding import LayerBinding


@dataclass(frozen=True, slots=True)
class StepSizes:
    """A step's numbers of prompt rows and of granules that it writes to."""

    num_rows: int
    num_programs: int
    at_once: bool = False
    """Whether no route matters to the step itself, so that all layers are decided after the last:
    two launches instead of two a layer."""


class GroupPooling:
    """Query sums of one KV cache group's routed layers, and the routers' work on them.

    Args:
        runtime: of this worker; its policy is `router`.
        kv_cache: of any layer of the group, for its number of blocks.
        layers: routed layers of the group, in the order in which they run.
        block_size: tokens a block.
        max_rows: most rows of a batch.
    """

    def __init__(
        self,
        runtime: FluxRuntime,
        kv_cache: torch.Tensor,
        layers: list[int],
        block_size: int,
        max_rows: int,
    ) -> None:
        assert runtime.router is not None
        assert runtime.info is not None
        device, head_dim = kv_cache.device, runtime.router.head_dim
        granules = kv_cache.shape[0] * (block_size // GRANULE_TOKENS)
        self._runtime = runtime
        self._block_size = block_size
        self._pool_tokens = runtime.info.pool_tokens
        self._sums = torch.zeros(
            len(layers), granules, head_dim, dtype=torch.bfloat16, device=device
        )
        self._counts = torch.zeros(granules, dtype=torch.uint8, device=device)
        self._step = PooledStep(
            torch.zeros(max_rows, COLUMNS, dtype=torch.int32, device=device),
            torch.zeros(max_rows, dtype=torch.int32, device=device),
            torch.ones(max_rows, device=device),
        )
        # One entry a prompt row; with few rows, one a row and layer.
        self._entries = max(max_rows, len(layers))
        self._pooled = torch.zeros(self._entries, head_dim, device=device)
        self._workspace = pooling_workspace(self._entries, self._pool_tokens, head_dim, device)
        self._router_workspace = router_workspace(self._entries, head_dim, device)
        self._layers = torch.tensor(layers, dtype=torch.int32, device=device)
        self._weights: RouterWeights = router_weights(runtime.router, device)

    @staticmethod
    def fixed_nbytes(router: LayerRouter, max_rows: int, pool_tokens: int) -> int:
        """Return the memory that does not grow with the KV cache: workspaces and weights."""
        head_dim = router.head_dim
        floats = 2 * pool_slots(pool_tokens) * head_dim + 2 * head_dim  # pooling_workspace, pooled
        floats += SLICES * 4 * head_dim  # router_workspace
        weights = sum(parameter.numel() for parameter in router.parameters())
        joint = router.num_layers * 32 * head_dim**2
        entries = max(max_rows, router.num_layers)
        return 4 * (entries * floats + max_rows * (COLUMNS + 2) + weights + joint)

    def begin_step(self, active: ActiveStep, metadata: "FlashAttentionMetadata") -> StepSizes:
        """Upload the step's prompt rows and update the token counts, before the first layer."""
        context = active.context
        packed = pack_prompt_rows(context.spans(), active.to_route, active.slots)
        rows = len(packed.rows)
        if rows:
            self._step.rows[:rows] = to_device(packed.rows, self._sums.device)
        update_counts(
            self._counts,
            metadata.slot_mapping,
            int(context.scheduled.sum()),
            metadata.block_table,
            self._step,
            rows,
            packed.num_programs,
            block_size=self._block_size,
            pool_tokens=self._pool_tokens,
        )
        is_short = context.computed + context.scheduled <= self._runtime.pattern.reach
        return StepSizes(
            rows,
            packed.num_programs,
            at_once=bool((is_short | ~context.is_prefill).all())
            and rows * len(self._layers) <= self._entries,
        )

    def route(
        self,
        binding: "LayerBinding",
        group_index: int,
        query: torch.Tensor,
        metadata: "FlashAttentionMetadata",
        views: ViewBuffers,
        sizes: StepSizes,
    ) -> None:
        """Update one layer's sums and decide its open routes.

        Args:
            binding: the layer.
            group_index: its index in the group.
            query: [T, N, H] after RoPE.
            metadata: vLLM's for the batch.
            views: the decided rows change passes in them.
            sizes: of `begin_step`.

        Host sync: none.
        """
        rows, last = sizes.num_rows, group_index == len(self._layers) - 1
        update_sums(
            query,
            self._sums[group_index],
            metadata.slot_mapping,
            self._step,
            self._workspace,
            inverse_rotary(binding.rotary),
            rows,
            sizes.num_programs,
            pool_tokens=self._pool_tokens,
            entry=group_index * rows if sizes.at_once else 0,
        )
        if sizes.at_once and last:
            pooled = self._pool(self._sums, metadata, rows)
            decide_layers(
                pooled,
                self._step.rows,
                rows,
                self._weights,
                self._layers,
                switch=self._switch(metadata, views, slice(None)),
                **self._shared(),
            )
        elif not sizes.at_once:
            pooled = self._pool(self._sums[group_index : group_index + 1], metadata, rows)
            decide_routes(
                pooled,
                self._step.rows,
                rows,
                self._weights,
                binding.layer,
                binding.layer,
                switch=self._switch(metadata, views, group_index),
                **self._shared(),
            )

    def _pool(
        self, sums: torch.Tensor, metadata: "FlashAttentionMetadata", rows: int
    ) -> torch.Tensor:
        """Pool some layers' rows, over all tensor-parallel ranks: [layers * rows, H]."""
        pool_rows(
            sums,
            self._counts,
            metadata.block_table,
            self._step,
            self._workspace,
            self._pooled,
            rows,
            block_size=self._block_size,
            pool_tokens=self._pool_tokens,
        )
        return self._runtime.reduce_mean(self._pooled[: len(sums) * rows])

    def _switch(
        self, metadata: "FlashAttentionMetadata", views: ViewBuffers, index: int | slice
    ) -> RowSwitch:
        return RowSwitch(
            metadata.seq_lens,
            metadata.query_start_loc,
            views.full_seqused_q[index],
            views.sparse_seqused_q[index],
        )

    def _shared(self) -> dict[str, Any]:
        """Return what both ways of deciding take."""
        runtime = self._runtime
        return {
            "threshold": runtime.config.threshold,
            "tables": RouteTables(runtime.table.routes, runtime.table.full_probability),
            "workspace": self._router_workspace,
            "sparse_beyond_tokens": runtime.pattern.reach,
        }


def inverse_rotary(rotary: RotaryInverse) -> InverseRotary:
    """Describe a rotation for the kernels: by frequencies where they suffice, else by tables."""
    if rotary.inv_freq is None:
        return InverseRotary(rotary.rotary_dim, rotary.interleaved, cos=rotary.cos, sin=rotary.sin)
    return InverseRotary(
        rotary.rotary_dim, rotary.interleaved, rotary.inv_freq, rotary.attention_scaling
    )
