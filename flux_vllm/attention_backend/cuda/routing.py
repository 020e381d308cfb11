"""Pooling and routing on the GPU: one KV cache group's query sums, and a step's decisions.

In a step whose routes matter to the step itself, each layer adds its queries to the sums, pools and
decides before it attends. Short prompts attend alike under both routes: there a layer only keeps
its queries' mean over heads, and the rest is done for all layers together once the step's tokens
are sampled.

Dimension legend: L layers, P prompt rows, T tokens of the step, G granules of the KV cache, H head
dim.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flux_vllm.attention_backend.cuda.views import ViewBuffers
from flux_vllm.attention_backend.kernels.pooling import pool_rows, pooling_workspace
from flux_vllm.attention_backend.kernels.prompt_rows import (
    COLUMNS,
    NO_ROWS,
    PackedRows,
    PromptRowBuffers,
    pack_prompt_rows,
    pool_ends,
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
from flux_vllm.router.state import upload
from flux_vllm.runtime import FluxRuntime, RoutedBatch

if TYPE_CHECKING:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    from flux_vllm.attention_backend.layer import LayerBinding


@dataclass(frozen=True, slots=True)
class PromptRouting:
    """The prompt rows of a step, and how they are routed."""

    packed: PackedRows
    mean_query: Sequence[torch.Tensor] | None
    """Of each layer [T, H] float32: where its queries' mean over heads is kept, for all layers to
    be routed at once; None where the step does not wait for that."""
    in_turn: bool
    """Whether each layer routes before it attends."""


class GroupPooling:
    """Query sums of one KV cache group's routed layers, and the routers' work on them.

    Args:
        bindings: of the group's routed layers, in the order in which they run; the policy is
            `router`.
        kv_cache: of any layer of the group, for its number of blocks.
        block_size: tokens a block.
        max_rows: most rows of a batch.
        max_tokens: most tokens of a batch.
    """

    def __init__(
        self,
        bindings: Sequence["LayerBinding"],
        kv_cache: torch.Tensor,
        block_size: int,
        max_rows: int,
        max_tokens: int,
    ) -> None:
        runtime = bindings[0].runtime
        assert runtime.router is not None
        assert runtime.info is not None
        device, head_dim = kv_cache.device, runtime.router.head_dim
        layers = [binding.layer for binding in bindings]
        granules = kv_cache.shape[0] * (block_size // GRANULE_TOKENS)
        self._runtime = runtime
        self._block_size = block_size
        self._pool_tokens = runtime.info.pool_tokens
        self._sums = torch.zeros(
            len(layers), granules, head_dim, dtype=torch.bfloat16, device=device
        )
        self._counts = torch.zeros(granules, dtype=torch.uint8, device=device)
        self._step = PromptRowBuffers(
            torch.zeros(max_rows, COLUMNS, dtype=torch.int32, device=device),
            torch.zeros(max_rows, dtype=torch.int32, device=device),
        )
        # One entry a prompt row; with few rows, one a row and layer.
        self._entries = max(max_rows, len(layers))
        self._pooled = torch.zeros(self._entries, head_dim, device=device)
        self._workspace = pooling_workspace(
            self._entries, self._pool_tokens, runtime.info.pool_prefix, head_dim, device
        )
        self._router_workspace = router_workspace(self._entries, head_dim, device)
        self._mean_query = torch.zeros(
            len(layers), _kept_tokens(runtime, max_tokens), head_dim, device=device
        )
        self._layers = layers
        self._columns = torch.tensor(layers, dtype=torch.int32, device=device)
        self._weights: RouterWeights = router_weights(runtime.router, device)
        self._rotary = [inverse_rotary(binding.rotary) for binding in bindings]
        self._alike = [
            list(group)
            for _, group in itertools.groupby(
                range(len(layers)), key=lambda index: id(bindings[index].rotary)
            )
        ]
        """Runs of layers with the same rotary embedding."""

    @staticmethod
    def fixed_nbytes(runtime: FluxRuntime, max_rows: int, max_tokens: int) -> int:
        """Return the memory that does not grow with the KV cache: workspaces and weights."""
        router, info = runtime.router, runtime.info
        assert router is not None
        assert info is not None
        head_dim = router.head_dim
        parts = pool_ends(info.pool_prefix) * pool_slots(info.pool_tokens)
        floats = (parts + 2) * head_dim  # pooling and pooled
        floats += SLICES * 4 * head_dim  # router_workspace
        weights = sum(parameter.numel() for parameter in router.parameters())
        joint = router.num_layers * 32 * head_dim**2
        entries = max(max_rows, router.num_layers)
        kept = router.num_layers * _kept_tokens(runtime, max_tokens) * head_dim
        return 4 * (entries * floats + max_rows * (COLUMNS + 1) + weights + joint + kept)

    def begin_step(
        self, active: RoutedBatch, metadata: "FlashAttentionMetadata"
    ) -> PromptRouting | None:
        """Take up the step's rows before the first layer.

        Args:
            active: the batch.
            metadata: vLLM's for the batch.

        Returns: PromptRouting, for `route` of every layer; None for a step without prompt tokens.
        Host sync: none.
        """
        batch, kept = active.batch, metadata.num_actual_tokens
        tokens = int(batch.scheduled.sum())
        # Every step resets granules whose first slot it writes, also one that only decodes.
        if not batch.is_prefill.any():
            update_counts(self._counts, metadata.slot_mapping, tokens, NO_ROWS, self._step)
            return None
        packed = pack_prompt_rows(batch.spans(), active.to_route, active.slots)
        rows = len(packed.rows)
        is_short = batch.computed + batch.scheduled <= self._runtime.pattern.reach
        fits = rows * len(self._layers) <= self._entries and kept <= self._mean_query.shape[1]
        at_once = bool(rows and fits and (is_short | ~batch.is_prefill).all())
        # vLLM's warm-up has short prompts only: let it compile both ways.
        in_turn = not at_once or batch.is_warmup
        if in_turn:
            self._count(packed, tokens, metadata)
        if at_once:
            work = functools.partial(self._route_layers, packed, tokens, metadata)
            self._runtime.defer(work)
        mean_query = self._mean_query[:, :kept].unbind() if at_once else None
        return PromptRouting(packed, mean_query, in_turn) if rows else None

    def _count(self, packed: PackedRows, tokens: int, metadata: "FlashAttentionMetadata") -> None:
        """Upload the prompt rows and update the token counts."""
        if len(packed.rows):
            upload(packed.rows, self._step.rows[: len(packed.rows)])
        update_counts(self._counts, metadata.slot_mapping, tokens, packed, self._step)

    def route(
        self,
        index: int,
        query: torch.Tensor,
        metadata: "FlashAttentionMetadata",
        views: ViewBuffers,
        step: PromptRouting,
    ) -> None:
        """Update one layer's sums and decide its open routes, or keep what that needs.

        Args:
            index: the layer's, in the group.
            query: [T, N, H] after RoPE.
            metadata: vLLM's for the batch.
            views: the decided rows change passes in them.
            step: of `begin_step`.

        Host sync: none.
        """
        if step.mean_query is not None:
            # By position: a keyword costs the host 2 us more.
            torch.mean(query, 1, dtype=torch.float32, out=step.mean_query[index])
        if not step.in_turn:
            return
        sums = self._sums[index : index + 1]
        self._update(query[None], sums, metadata, step.packed, index, 0)
        own = views.layer_rows(metadata.seq_lens.shape[0])[index]
        switch = RowSwitch(
            metadata.seq_lens,
            metadata.query_start_loc,
            own.full_seqused_q,
            own.sparse_seqused_q,
            self._runtime.pattern.reach,
        )
        layer, rows = self._layers[index], len(step.packed.rows)
        decide_routes(
            self._pool(sums, metadata, rows),
            self._step.rows,
            rows,
            self._weights,
            layer,
            layer,
            switch=switch,
            **self._shared(),
        )

    def _route_layers(
        self, packed: PackedRows, tokens: int, metadata: "FlashAttentionMetadata"
    ) -> None:
        """Update all layers' sums from the means that they kept, and decide all open routes."""
        self._count(packed, tokens, metadata)
        rows = len(packed.rows)
        for run in self._alike:
            part = slice(run[0], run[-1] + 1)
            # As queries of a single head.
            query = self._mean_query[part, :, None]
            self._update(query, self._sums[part], metadata, packed, run[0], run[0] * rows)
        decide_layers(
            self._pool(self._sums, metadata, rows),
            self._step.rows,
            rows,
            self._weights,
            self._columns,
            **self._shared(),
        )

    def _update(
        self,
        query: torch.Tensor,
        sums: torch.Tensor,
        metadata: "FlashAttentionMetadata",
        packed: PackedRows,
        index: int,
        entry: int,
    ) -> None:
        """Update the sums of layers alike, of which `index` is one; workspace from `entry` on."""
        update_sums(
            query,
            sums,
            metadata.slot_mapping,
            self._step,
            self._workspace.from_entry(entry) if entry else self._workspace,
            self._rotary[index],
            packed,
            pool_tokens=self._pool_tokens,
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

    def _shared(self) -> dict[str, Any]:
        """Return what both ways of deciding take."""
        runtime = self._runtime
        return {
            "threshold": runtime.config.threshold,
            "tables": RouteTables(runtime.table.routes, runtime.table.full_probability),
            "workspace": self._router_workspace,
        }


def _kept_tokens(runtime: FluxRuntime, max_tokens: int) -> int:
    """Return the most tokens whose means a step keeps: one prompt as long as the pattern reaches.

    With more, the GPU is busy long enough for a layer's own launches.
    """
    return min(runtime.pattern.reach, max_tokens)


def inverse_rotary(rotary: RotaryInverse) -> InverseRotary:
    """Describe a rotation for the kernels: by frequencies where they suffice, else by tables."""
    if rotary.inv_freq is None:
        return InverseRotary(rotary.rotary_dim, rotary.interleaved, cos=rotary.cos, sin=rotary.sin)
    return InverseRotary(
        rotary.rotary_dim, rotary.interleaved, rotary.inv_freq, rotary.attention_scaling
    )
