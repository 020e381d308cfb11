"""FlashAttention-3 with row indices: the only place that calls vLLM's FA3 operator.

vLLM's Python wrapper passes neither `kv_batch_idx` nor `seqused_q`, which routes need: the first
lets FULL and SPARSE rows share one call, the second switches rows off on the device.

Dimension legend: R rows, T packed tokens, N query heads, K kv heads, H head dim, B KV blocks,
M table width.
"""

import torch

from flux_vllm.attention_backend.kernels.sink_merge import merge_sinks
from flux_vllm.attention_backend.kernels.tiles import is_hopper


def is_available() -> bool:
    """Tell whether vLLM's FA3 operator is there and this GPU runs it."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Say why FA3 does not run here; None where it does."""
    if not is_hopper():
        return "the GPU is not of compute capability 9"
    try:
        from vllm.vllm_flash_attn import flash_attn_interface
    except ImportError as error:
        return str(error)
    if not flash_attn_interface.FA3_AVAILABLE:
        return str(flash_attn_interface.FA3_UNAVAILABLE_REASON)
    return None


def attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    kv_batch_idx: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seqused_k: torch.Tensor,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    seqused_q: torch.Tensor | None = None,
    window_tokens: int | None = None,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
) -> torch.Tensor:
    """Attend causally, each row over the table row that `kv_batch_idx` names.

    Decode of mixed routes is one such call with the views of `write_views`. The full pass
    of a batch with prefill rows adds `seqused_q`.

    Args:
        query: [T, N, H] float16 or bfloat16.
        key_cache: [B, block_size, K, H] of the same dtype, block_size a multiple of 16.
        value_cache: [B, block_size, K, H], likewise.
        out: [T, N, H]; rows with `seqused_q` 0 are left as they are.
        block_table: [any, M] int32.
        kv_batch_idx: [R] int32 contiguous; None where row r's table row is r, of R.
        query_start_loc: [R + 1] int32.
        seqused_k: [R] int32 contiguous: keys of the table row; the last is the last query's own.
        max_query_len: most queries a row has (host).
        max_seq_len: most keys a row has (host).
        scale: softmax scale.
        seqused_q: [R] int32 contiguous: queries of each row, 0 to skip it; None for all.
        window_tokens: attend to so many latest keys, the query's own included; None for all.
        scheduler_metadata: FA3's work plan for exactly these rows and this `num_splits`; None
            lets the call make it, which is safe in a CUDA graph.
        num_splits: most shares of a row's keys; 0 lets FA3 choose (not for CUDA graphs).

    Returns: lse [N, T] float32, natural logarithm; unspecified for skipped rows.
    Source: vLLM 0.33 vllm_flash_attn/flash_attn_interface.py:388-426; hopper/flash_api.cpp.
    Host sync: none. CUDA graph: safe.
    """
    return torch.ops._vllm_fa3_C.fwd(
        query,
        key_cache,
        value_cache,
        None,  # k_new
        None,  # v_new
        None,  # q_v
        out,
        query_start_loc,
        None,  # cu_seqlens_k
        None,  # cu_seqlens_k_new
        seqused_q,
        seqused_k,
        max_query_len,
        max_seq_len,
        block_table,
        kv_batch_idx,
        None,  # leftpad_k
        None,  # rotary_cos
        None,  # rotary_sin
        None,  # seqlens_rotary
        None,  # q_descale
        None,  # k_descale
        None,  # v_descale
        scale,
        True,  # is_causal
        -1 if window_tokens is None else window_tokens - 1,
        -1 if window_tokens is None else 0,
        0.0,  # softcap
        True,  # is_rotary_interleaved, without effect
        scheduler_metadata,
        num_splits,
        None,  # pack_gqa
        0,  # sm_margin
        None,  # s_aux
        1,  # cp_world_size
        0,  # cp_rank
        None,  # cp_tot_seqused_k
    )[1]


def attend_sparse_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    kv_batch_idx: torch.Tensor,
    query_start_loc: torch.Tensor,
    seqused_q: torch.Tensor,
    seqused_k: torch.Tensor,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    sink_tokens: int,
    window_tokens: int,
) -> None:
    """Attend SPARSE prefill rows exactly: FA3 over the window, then the sinks outside it.

    Args:
        query: [T, N, H] float16 or bfloat16.
        key_cache: [B, block_size, K, H], likewise.
        value_cache: [B, block_size, K, H], likewise.
        out: [T, N, H]; rows with `seqused_q` 0 are left as they are.
        block_table: [any, M] int32.
        kv_batch_idx: [R] int32 contiguous: each row's real table row.
        query_start_loc: [R + 1] int32.
        seqused_q: [R] int32 contiguous: all queries of the rows to attend, 0 for others.
        seqused_k: [R] int32 contiguous: keys, this step's queries included.
        max_query_len: most queries a row has (host).
        max_seq_len: most keys a row has (host).
        scale: softmax scale.
        sink_tokens: first tokens attended.
        window_tokens: latest tokens attended, the query's own included.

    Host sync: none. CUDA graph: safe.
    """
    lse = attend(
        query,
        key_cache,
        value_cache,
        out,
        block_table,
        kv_batch_idx,
        query_start_loc,
        seqused_k,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        scale=scale,
        seqused_q=seqused_q,
        window_tokens=window_tokens,
    )
    merge_sinks(
        query,
        key_cache,
        value_cache,
        out,
        lse,
        block_table,
        query_start_loc,
        seqused_q,
        seqused_k,
        scale=scale,
        sink_tokens=sink_tokens,
        window_tokens=window_tokens,
        kv_batch_idx=kv_batch_idx,
    )
