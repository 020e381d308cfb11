"""The two families of CUDA kernels behind one interface: FlashAttention-3, and our Triton ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from flux_vllm.attention_backend.cuda.views import LayerRows, ViewBuffers
from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.decode_plan import CallShape
from flux_vllm.attention_backend.kernels.triton_decode import (
    QUERIES,
    DecodeWorkspace,
    attend_decode,
    choose_num_splits,
    decode_workspace,
    most_shares,
)
from flux_vllm.attention_backend.kernels.triton_prefill import SUPPORTED_HEAD_DIMS, attend_prefill
from flux_vllm.errors import FluxConfigError, UnsupportedConfigurationError
from flux_vllm.routing.runtime import FluxRuntime

if TYPE_CHECKING:
    from vllm.v1.attention.backends.flash_attn import (
        FlashAttentionImpl,
        FlashAttentionMetadata,
    )


@dataclass(slots=True)
class LayerCall:
    """One layer's attention in one step."""

    query: torch.Tensor
    """[T, N, H]."""
    keys: torch.Tensor
    """[num_blocks, block_size, K, H], a view of the KV cache."""
    values: torch.Tensor
    """Likewise."""
    out: torch.Tensor
    """[T, N, H]; rows that a pass leaves out keep theirs."""
    metadata: "FlashAttentionMetadata"
    """vLLM's for the batch."""
    views: ViewBuffers
    rows: LayerRows
    """The layer's part of the views."""
    plan: torch.Tensor | None = None
    """[size]: the layer's part of what `Kernels.plan` returned for the batch."""


class Kernels(Protocol):
    """The kinds of attention call that a layer makes."""

    scale: float
    """Of the scores."""

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


def choose_kernels(impl: "FlashAttentionImpl", runtime: FluxRuntime) -> Kernels:
    """Choose the kernels of a layer: those asked for, else FlashAttention-3 where it runs.

    Raises:
        FluxConfigError: FlashAttention-3 was asked for and is not there.
        UnsupportedConfigurationError: the Triton kernels do not take this head size.
    """
    wanted = runtime.config.kernels
    has_fa3 = fa3.is_available() and impl.vllm_flash_attn_version == 3
    if wanted == "fa3" and not has_fa3:
        raise FluxConfigError(
            'flux config: expected FlashAttention-3 for "kernels": "fa3" (a GPU of compute '
            f"capability 9.0), found FlashAttention-{impl.vllm_flash_attn_version} on "
            f'{torch.cuda.get_device_name()}; use "kernels": "triton" or leave it out'
        )
    if wanted == "triton" or not has_fa3:
        if impl.head_size not in SUPPORTED_HEAD_DIMS:
            raise UnsupportedConfigurationError(
                "layer routes with Triton kernels: expected a head_dim among "
                f"{SUPPORTED_HEAD_DIMS}, found {impl.head_size}; serve this model with "
                "--attention-backend FLASH_ATTN"
            )
        return TritonKernels(impl, runtime)
    return FA3Kernels(impl, runtime)


def workspace_nbytes(
    runtime: FluxRuntime, max_rows: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Return the memory of the decode workspace, which the Triton kernels alone have.

    Args:
        runtime: of the worker.
        max_rows: most rows of a batch.
        heads: query heads of this rank.
        kv_heads: of this rank.
        head_dim: of a head.
    """
    if runtime.config.kernels != "triton":
        # Without a GPU sizes are estimated, for one with FlashAttention-3.
        if not torch.cuda.is_available():
            return 0
        if fa3.is_available() and get_flash_attn_version(head_size=head_dim) == 3:
            return 0
    shares = most_shares(max_rows, kv_heads, _num_sms(runtime))
    return 4 * QUERIES * shares * heads * (head_dim + 1)


class FA3Kernels:
    """FlashAttention-3: one call for mixed decode; window and sinks for sparse prefill."""

    def __init__(self, impl: "FlashAttentionImpl", runtime: FluxRuntime) -> None:
        self.scale = impl.scale
        self._shape = CallShape(
            impl.num_heads, impl.num_kv_heads, impl.head_size, _num_sms(runtime)
        )
        self._sink_tokens = runtime.sink_tokens
        self._window_tokens = runtime.window_tokens

    def plan(self, views: ViewBuffers, metadata: "FlashAttentionMetadata") -> torch.Tensor | None:
        """Write balanced plans, where FA3 would make its own before each call."""
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
        metadata = call.metadata
        self._attend(call, metadata.query_start_loc, None, metadata.max_query_len)

    def full_pass(self, call: LayerCall) -> None:
        """Attend likewise, less the rows that the other pass takes."""
        metadata, seqused_q = call.metadata, call.rows.full_seqused_q
        self._attend(call, metadata.query_start_loc, seqused_q, metadata.max_query_len)

    def every_key_pass(
        self,
        call: LayerCall,
        query_start_loc: torch.Tensor,
        seqused_q: torch.Tensor,
        max_query_len: int,
    ) -> None:
        """Attend likewise."""
        self._attend(call, query_start_loc, seqused_q, max_query_len)

    def _attend(
        self,
        call: LayerCall,
        query_start_loc: torch.Tensor,
        seqused_q: torch.Tensor | None,
        max_query_len: int,
    ) -> None:
        metadata = call.metadata
        fa3.attend(
            call.query,
            call.keys,
            call.values,
            call.out,
            call.views.table,
            call.rows.kv_batch_idx,
            query_start_loc,
            call.rows.seqused_k,
            max_query_len=max_query_len,
            max_seq_len=metadata.max_seq_len,
            scale=self.scale,
            seqused_q=seqused_q,
            scheduler_metadata=call.plan,
            num_splits=metadata.max_num_splits,
        )

    def sink_window_pass(self, call: LayerCall) -> None:
        """Attend over the window with FA3, then merge the sinks."""
        metadata = call.metadata
        fa3.attend_sparse_prefill(
            call.query,
            call.keys,
            call.values,
            call.out,
            call.views.table,
            call.rows.kv_batch_idx,
            metadata.query_start_loc,
            call.rows.sparse_seqused_q,
            metadata.seq_lens,
            max_query_len=metadata.max_query_len,
            max_seq_len=metadata.max_seq_len,
            scale=self.scale,
            sink_tokens=self._sink_tokens,
            window_tokens=self._window_tokens,
        )


class TritonKernels:
    """Our Triton kernels: any CUDA GPU."""

    _workspaces: ClassVar[WeakKeyDictionary[FluxRuntime, DecodeWorkspace]] = WeakKeyDictionary()
    """A worker's only one, of all its layers: captured graphs keep its address."""

    def __init__(self, impl: "FlashAttentionImpl", runtime: FluxRuntime) -> None:
        self.scale = impl.scale
        self._sink_tokens = runtime.sink_tokens
        self._window_tokens = runtime.window_tokens
        self._runtime = runtime
        self._num_sms = _num_sms(runtime)

    def _workspace(self, call: LayerCall) -> DecodeWorkspace:
        tokens, heads, head_dim = call.query.shape
        rows, kv_heads = call.metadata.seq_lens.shape[0], call.keys.shape[2]
        whole = self._workspaces.get(self._runtime)
        if whole is None:
            shares = most_shares(call.views.capacity, kv_heads, self._num_sms)
            whole = decode_workspace(QUERIES * shares, heads, head_dim, 1, call.query.device)
            self._workspaces[self._runtime] = whole
        splits = choose_num_splits(rows, kv_heads, self._num_sms)
        return whole.fit(splits, tokens, heads, head_dim)

    def plan(self, views: ViewBuffers, metadata: "FlashAttentionMetadata") -> torch.Tensor | None:
        """Plan nothing: the shares of a batch are all alike."""
        return None

    def decode(self, call: LayerCall) -> None:
        """Attend in one split-KV call over the views."""
        attend_decode(
            call.query,
            call.keys,
            call.values,
            call.out,
            call.views.table,
            call.rows.kv_batch_idx,
            call.metadata.query_start_loc,
            call.rows.seqused_k,
            self._workspace(call),
            max_query_len=call.metadata.max_query_len,
            scale=self.scale,
        )

    def full_pass(self, call: LayerCall) -> None:
        """Attend by tiles of queries."""
        seqused_q = call.rows.full_seqused_q
        self._prefill(call, call.metadata.query_start_loc, seqused_q, sparse=False)

    def every_key_pass(
        self,
        call: LayerCall,
        query_start_loc: torch.Tensor,
        seqused_q: torch.Tensor,
        max_query_len: int,
    ) -> None:
        """Attend likewise."""
        self._prefill(call, query_start_loc, seqused_q, sparse=False)

    def sink_window_pass(self, call: LayerCall) -> None:
        """Attend sinks and window in one fused kernel."""
        seqused_q = call.rows.sparse_seqused_q
        self._prefill(call, call.metadata.query_start_loc, seqused_q, sparse=True)

    def _prefill(
        self,
        call: LayerCall,
        query_start_loc: torch.Tensor,
        seqused_q: torch.Tensor,
        sparse: bool,
    ) -> None:
        attend_prefill(
            call.query,
            call.keys,
            call.values,
            call.out,
            call.views.table,
            query_start_loc,
            seqused_q,
            call.rows.seqused_k,
            scale=self.scale,
            sparse=sparse,
            sink_tokens=self._sink_tokens,
            window_tokens=self._window_tokens,
            kv_batch_idx=call.rows.kv_batch_idx,
        )


def _num_sms(runtime: FluxRuntime) -> int:
    count: int = torch.cuda.get_device_properties(runtime.table.device).multi_processor_count
    return count


def split_cache(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """View vLLM's [num_blocks, K, block_size, 2 * H] as keys and values [blocks, size, K, H]."""
    keys, values = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return canonicalize_singleton_dim_strides(keys), canonicalize_singleton_dim_strides(values)
