"""Attention calls by our Triton kernels."""

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
from flux_vllm.attention_backend.kernels.paged import PagedRows
from flux_vllm.attention_backend.kernels.triton_decode import (
    QUERIES,
    DecodeWorkspace,
    attend_decode,
    choose_num_splits,
    decode_workspace,
    fitting_splits,
    most_shares,
    query_tile,
)
from flux_vllm.attention_backend.kernels.triton_prefill import MANY_TOKENS, attend_prefill

if TYPE_CHECKING:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata


class SharedWorkspace:
    """A worker's decode workspace, made once for all its layers: captured graphs keep its address.

    Args:
        num_sms: streaming multiprocessors of the GPU.
    """

    def __init__(self, num_sms: int) -> None:
        self._num_sms = num_sms
        self._whole: DecodeWorkspace | None = None

    def of(self, call: LayerCall) -> DecodeWorkspace:
        """Return the part that a call needs."""
        tokens, heads, head_dim = call.query.shape
        rows, kv_heads = call.metadata.seq_lens.shape[0], call.cache.keys.shape[2]
        if self._whole is None:
            shares = self._shares(call.table.shape[0] // 2, kv_heads)
            self._whole = decode_workspace(shares, heads, head_dim, 1, call.query.device)
        splits = choose_num_splits(rows, kv_heads, self._num_sms)
        return self._whole.fit(splits, tokens, heads, head_dim)

    def splits(self, capacity: int, rows: int, tokens: int, kv_heads: int) -> int:
        """Return how often a batch's rows are split, where views hold `capacity` rows."""
        wanted = choose_num_splits(rows, kv_heads, self._num_sms)
        return fitting_splits(wanted, tokens, self._shares(capacity, kv_heads))

    def _shares(self, capacity: int, kv_heads: int) -> int:
        return QUERIES * most_shares(capacity, kv_heads, self._num_sms)


class TritonKernels:
    """Our Triton kernels: any CUDA GPU."""

    name = "triton"

    def __init__(
        self, impl: "FlashAttentionImpl", sizes: Sizes, workspace: SharedWorkspace
    ) -> None:
        self.scale = impl.scale
        self.sink_logits = impl.sinks
        self._heads, self._kv_heads = impl.num_heads, impl.num_kv_heads
        self._sink_tokens = sizes.sink_tokens
        self._window_tokens = sizes.window_tokens
        self._workspace = workspace

    def variants(self, limits: Limits) -> Variants:
        """Return splits and tiles by rows and queries, and tiles of prefill by tokens."""
        decode: dict[tuple[int, int], DecodeCase] = {}
        for most_queries in range(1, limits.step_tokens + 1):
            tile = query_tile(most_queries, self._heads // self._kv_heads)
            for rows in range(1, limits.rows + 1):
                for queries in range(1, most_queries + 1):
                    splits = self._workspace.splits(
                        limits.capacity, rows, rows * queries, self._kv_heads
                    )
                    case = DecodeCase(rows, queries, most_queries)
                    decode.setdefault((splits, tile), case)
        return Variants([*decode.values()], tokens_by_tile(limits.tokens, MANY_TOKENS))

    def plan(self, views: ViewBuffers, metadata: "FlashAttentionMetadata") -> torch.Tensor | None:
        """Plan nothing: the shares of a batch are all alike."""
        return None

    def decode(self, call: LayerCall) -> None:
        """Attend in one split-KV call over the views."""
        attend_decode(
            call.query,
            call.cache,
            call.out,
            call.paged_rows(),
            self._workspace.of(call),
            max_query_len=call.metadata.max_query_len,
            scale=self.scale,
            sink_logits=self.sink_logits,
        )

    def full_pass(self, call: LayerCall) -> None:
        """Attend by tiles of queries."""
        self._prefill(call, call.paged_rows(call.rows.full_seqused_q), sparse=False)

    def every_key_pass(
        self,
        call: LayerCall,
        query_start_loc: torch.Tensor,
        seqused_q: torch.Tensor,
        max_query_len: int,
    ) -> None:
        """Attend likewise."""
        self._prefill(call, call.paged_rows(seqused_q, query_start_loc), sparse=False)

    def sink_window_pass(self, call: LayerCall) -> None:
        """Attend sinks and window in one fused kernel."""
        self._prefill(call, call.paged_rows(call.rows.sparse_seqused_q), sparse=True)

    def _prefill(self, call: LayerCall, rows: PagedRows, sparse: bool) -> None:
        attend_prefill(
            call.query,
            call.cache,
            call.out,
            rows,
            scale=self.scale,
            sparse=sparse,
            sink_tokens=self._sink_tokens,
            window_tokens=self._window_tokens,
            sink_logits=self.sink_logits,
        )
