"""Attention calls by FlashAttention-3."""

from typing import TYPE_CHECKING

import torch

from flux_vllm.attention_backend.cuda.calls import (
    DecodeCase,
    LayerCall,
    Limits,
    Sizes,
    Variants,
    tokens_by_tile,
)
from flux_vllm.attention_backend.cuda.views import ViewBuffers
from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.decode_plan import CallShape, plan_variant
from flux_vllm.attention_backend.kernels.paged import PagedRows
from flux_vllm.attention_backend.kernels.sink_merge import MANY_TOKENS

if TYPE_CHECKING:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata


class FA3Kernels:
    """FlashAttention-3: one call for mixed decode; window and sinks for sparse prefill."""

    name = "fa3"

    def __init__(self, impl: "FlashAttentionImpl", sizes: Sizes) -> None:
        self.scale = impl.scale
        self.sink_logits = impl.sinks
        self._is_float8 = impl.is_float8
        self._shape = CallShape(impl.num_heads, impl.num_kv_heads, impl.head_size, sizes.num_sms)
        self._sink_tokens = sizes.sink_tokens
        self._window_tokens = sizes.window_tokens

    def variants(self, limits: Limits) -> Variants:
        """Return plans by rows and queries, and tiles of the sinks by tokens."""
        tiles = tokens_by_tile(limits.tokens, MANY_TOKENS)
        if self._is_float8:
            return Variants([DecodeCase(1, 1, 1)], tiles)
        decode: dict[tuple | None, DecodeCase] = {}
        for queries in range(1, limits.step_tokens + 1):
            for rows in range(1, limits.rows + 1):
                variant = plan_variant(self._shape, rows, queries)
                decode.setdefault(variant, DecodeCase(rows, queries, queries))
        return Variants([*decode.values()], tiles)

    def plan(self, views: ViewBuffers, metadata: "FlashAttentionMetadata") -> torch.Tensor | None:
        """Write balanced plans, where FA3 would make its own before each call.

        It does over a float8 cache: its tiles are others there, and what they take was not timed.
        """
        if self._is_float8:
            return None
        if metadata.max_num_splits == 0:  # FA3 chooses, so no graph replays the calls
            return None
        return views.plan(
            metadata.query_start_loc,
            self._shape,
            max_query_len=metadata.max_query_len,
            num_splits=metadata.max_num_splits,
        )

    def decode(self, call: LayerCall) -> None:
        """Attend in one call over the views."""
        self._attend(call, call.paged_rows(), call.metadata.max_query_len)

    def full_pass(self, call: LayerCall) -> None:
        """Attend likewise, less the rows that the other pass takes."""
        rows = call.paged_rows(call.rows.full_seqused_q)
        self._attend(call, rows, call.metadata.max_query_len)

    def every_key_pass(
        self,
        call: LayerCall,
        query_start_loc: torch.Tensor,
        seqused_q: torch.Tensor,
        max_query_len: int,
    ) -> None:
        """Attend likewise."""
        self._attend(call, call.paged_rows(seqused_q, query_start_loc), max_query_len)

    def _attend(self, call: LayerCall, rows: PagedRows, max_query_len: int) -> None:
        metadata = call.metadata
        fa3.attend(
            call.query,
            call.cache,
            call.out,
            rows,
            max_query_len=max_query_len,
            max_seq_len=metadata.max_seq_len,
            scale=self.scale,
            scheduler_metadata=call.plan,
            num_splits=metadata.max_num_splits,
            sink_logits=self.sink_logits,
            float8=call.float8,
        )

    def sink_window_pass(self, call: LayerCall) -> None:
        """Attend over the window with FA3, then merge the sinks."""
        metadata = call.metadata
        fa3.attend_sparse_prefill(
            call.query,
            call.cache,
            call.out,
            call.paged_rows(call.rows.sparse_seqused_q),
            max_query_len=metadata.max_query_len,
            max_seq_len=metadata.max_seq_len,
            scale=self.scale,
            sink_tokens=self._sink_tokens,
            window_tokens=self._window_tokens,
            sink_logits=self.sink_logits,
            float8=call.float8,
        )
