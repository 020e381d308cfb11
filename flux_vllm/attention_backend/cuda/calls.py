"""The attention calls of a layer on CUDA: what they get, and what all kernels have in common."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

from flux_vllm.attention_backend.cuda.views import ViewBuffers
from flux_vllm.attention_backend.kernels.decode_views import LayerViews
from flux_vllm.attention_backend.kernels.fa3 import Float8Operands
from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows

if TYPE_CHECKING:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata


@dataclass(slots=True)
class LayerCall:
    """One layer's attention in one step."""

    query: torch.Tensor
    """[T, N, H]."""
    cache: KVCache
    out: torch.Tensor
    """[T, N, H]; rows that a pass leaves out keep theirs."""
    metadata: "FlashAttentionMetadata"
    """vLLM's for the batch."""
    table: torch.Tensor
    """[2C, M] int32: real and compacted rows, of the layer's KV cache group."""
    views: LayerViews
    """Of all layers, as they are kept: [L, C]."""
    layer: int
    """Index among those layers."""
    rows: LayerViews
    """The layer's part of the views, each [R]."""
    plan: torch.Tensor | None = None
    """[size]: the layer's part of what `Kernels.plan` returned for the batch."""
    float8: Float8Operands | None = None
    """Of FlashAttention-3 over a float8 cache."""

    def paged_rows(
        self,
        seqused_q: torch.Tensor | None = None,
        query_start_loc: torch.Tensor | None = None,
    ) -> PagedRows:
        """Return the rows, each through its view: all of them, or by so many queries each.

        Args:
            seqused_q: [R] int32 contiguous: queries of each row, 0 to skip it.
            query_start_loc: [R + 1] int32, where those begin, if not where the batch's do.
        """
        starts = self.metadata.query_start_loc if query_start_loc is None else query_start_loc
        return PagedRows(self.table, self.rows.kv_batch_idx, starts, self.rows.seqused_k, seqused_q)


class Sizes(NamedTuple):
    """Numbers of a worker that its kernels are made with."""

    sink_tokens: int
    window_tokens: int
    num_sms: int
    """Streaming multiprocessors of the GPU."""


class Limits(NamedTuple):
    """The largest batches that an engine makes."""

    rows: int
    capacity: int
    """Rows that the views hold, padding for CUDA graphs included."""
    tokens: int
    """Of a step."""
    step_tokens: int
    """Of a decode row, drafts included."""


class DecodeCase(NamedTuple):
    """A batch of decode rows."""

    rows: int
    queries: int
    """Of each row."""
    max_query_len: int
    """Said to the kernels: rows need not have as many drafts as they may."""


class Variants(NamedTuple):
    """Batches that between them call every compiled kernel that serving can need."""

    decode: list[DecodeCase]
    prefill: list[int]
    """Tokens of batches with prefill rows."""


class Kernels(Protocol):
    """The kinds of attention call that a layer makes."""

    name: str
    """As the operator calls them: `fa3` or `triton`."""
    scale: float
    """Of the scores."""
    sink_logits: torch.Tensor | None
    """[N] of the heads' learned sinks; None for heads without."""

    def variants(self, limits: Limits) -> Variants:
        """Say which batches between them call every kernel that a batch within limits can."""

    def plan(self, views: ViewBuffers, metadata: "FlashAttentionMetadata") -> torch.Tensor | None:
        """Plan the `decode` calls of all layers that share the views.

        Args:
            views: of the batch, written.
            metadata: vLLM's for the batch.

        Returns: [L, size], in memory of the views; None where calls need no plan.
        """

    def decode(self, call: LayerCall) -> None:
        """Attend a batch without prefill rows, each row through its view."""

    def full_pass(self, call: LayerCall) -> None:
        """Attend decode rows, and prefill rows that are FULL or short."""

    def every_key_pass(
        self,
        call: LayerCall,
        query_start_loc: torch.Tensor,
        seqused_q: torch.Tensor,
        max_query_len: int,
    ) -> None:
        """Attend some rows' last queries to every key up to their own.

        Args:
            call: the layer's.
            query_start_loc: [R + 1] int32: where in the batch those queries begin.
            seqused_q: [R] int32 contiguous: how many they are.
            max_query_len: the most of them (host).
        """

    def sink_window_pass(self, call: LayerCall) -> None:
        """Attend the other prefill rows to sinks and window, exactly."""


class BatchPrefill(Protocol):
    """A batch's prefill rows, planned once a step and used by every layer."""

    def attend(self, call: LayerCall, kernels: Kernels) -> None:
        """Attend the rows whose `sparse_seqused_q` is not 0 in this layer; leave the others.

        Host sync: none.
        """


def tokens_by_tile(most_tokens: int, many_tokens: int) -> list[int]:
    """Return a batch's tokens below a kernel's change of tile and above it, as far as allowed."""
    return [min(2, most_tokens)] + [most_tokens] * (most_tokens >= many_tokens)


def split_cache(kv_cache: torch.Tensor, head_size: int) -> KVCache:
    """View vLLM's [num_blocks, K, block_size, 2 * H] as keys and values [blocks, size, K, H]."""
    keys, values = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return KVCache(
        canonicalize_singleton_dim_strides(keys), canonicalize_singleton_dim_strides(values)
    )
