"""FlashAttention-3 with row indices: the only place that calls vLLM's FA3 operator.

vLLM's Python wrapper passes neither `kv_batch_idx` nor `seqused_q`, which routes need: the first
lets FULL and SPARSE rows share one call, the second switches rows off on the device.

Dimension legend: R rows, T packed tokens, N query heads, H head dim.
"""

from typing import NamedTuple

import torch

from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows
from flux_vllm.attention_backend.kernels.sink_merge import merge_sinks
from flux_vllm.attention_backend.kernels.tiles import is_hopper


class Float8Operands(NamedTuple):
    """What a call over a float8 cache takes besides: FA3 multiplies float8 by float8 alone."""

    query: torch.Tensor
    """[T, N, H] float8_e4m3fn: the call's queries, divided by their scale."""
    query_scale: torch.Tensor
    """[] float32 on the device."""
    key_scale: torch.Tensor
    """Likewise."""
    value_scale: torch.Tensor
    """Likewise."""

    def descales(self, rows: int, kv_heads: int) -> list[torch.Tensor]:
        """Return the scales by row and KV head, as FA3 wants them: views."""
        return [scale.expand(rows, kv_heads) for scale in self[1:]]


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
    cache: KVCache,
    out: torch.Tensor,
    rows: PagedRows,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window_tokens: int | None = None,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    sink_logits: torch.Tensor | None = None,
    float8: Float8Operands | None = None,
) -> torch.Tensor:
    """Attend causally, each row over the table row that `kv_batch_idx` names.

    Decode of mixed routes is one such call with the views of `write_views`. The full pass
    of a batch with prefill rows adds `seqused_q`.

    Args:
        query: [T, N, H] float16 or bfloat16; bfloat16 where the cache is float8.
        cache: of the same dtype, or of float8_e4m3fn; block_size a multiple of 16.
        out: [T, N, H]; rows with `seqused_q` 0 are left as they are.
        rows: of the call; without `kv_batch_idx` the table has R rows.
        max_query_len: most queries a row has (host).
        max_seq_len: most keys a row has (host).
        scale: softmax scale.
        window_tokens: attend to so many latest keys, the query's own included; None for all.
        scheduler_metadata: FA3's work plan for exactly these rows and this `num_splits`; None
            lets the call make it, which is safe in a CUDA graph.
        num_splits: most shares of a row's keys; 0 lets FA3 choose (not for CUDA graphs).
        sink_logits: [N] bfloat16, of the heads' learned sinks; None for heads without.
        float8: of a float8 cache, whose queries are read instead.

    Returns: lse [N, T] float32, natural logarithm; unspecified for skipped rows, and where heads
        have learned sinks.
    Source: vLLM 0.33 vllm_flash_attn/flash_attn_interface.py:388-426; hopper/flash_api.cpp.
    Host sync: none. CUDA graph: safe.
    """
    descales: list[torch.Tensor | None] = [None, None, None]
    if float8 is not None:
        query = float8.query
        descales = [*float8.descales(rows.seqused_k.shape[0], cache.keys.shape[2])]
    return torch.ops._vllm_fa3_C.fwd(
        query,
        cache.keys,
        cache.values,
        None,  # k_new
        None,  # v_new
        None,  # q_v
        out,
        rows.query_start_loc,
        None,  # cu_seqlens_k
        None,  # cu_seqlens_k_new
        rows.seqused_q,
        rows.seqused_k,
        max_query_len,
        max_seq_len,
        rows.block_table,
        rows.kv_batch_idx,
        None,  # leftpad_k
        None,  # rotary_cos
        None,  # rotary_sin
        None,  # seqlens_rotary
        *descales,  # of q, k and v
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
        sink_logits,  # s_aux
        1,  # cp_world_size
        0,  # cp_rank
        None,  # cp_tot_seqused_k
    )[1]


def attend_sparse_prefill(
    query: torch.Tensor,
    cache: KVCache,
    out: torch.Tensor,
    rows: PagedRows,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    sink_tokens: int,
    window_tokens: int,
    sink_logits: torch.Tensor | None = None,
    float8: Float8Operands | None = None,
) -> None:
    """Attend SPARSE prefill rows exactly: FA3 over the window, then the sinks outside it.

    Args:
        query: [T, N, H] float16 or bfloat16.
        cache: likewise.
        out: [T, N, H]; rows with `seqused_q` 0 are left as they are.
        rows: of the call, with their real table rows; `seqused_q` is all queries of the rows to
            attend, 0 for others.
        max_query_len: most queries a row has (host).
        max_seq_len: most keys a row has (host).
        scale: softmax scale.
        sink_tokens: first tokens attended.
        window_tokens: latest tokens attended, the query's own included.
        sink_logits: [N] of the heads' learned sinks, merged with the sinks; None for heads without.
        float8: of a float8 cache, over which FA3 takes the window; the sinks meet `query` itself.

    Host sync: none. CUDA graph: safe.
    """
    lse = attend(
        query,
        cache,
        out,
        rows,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        scale=scale,
        window_tokens=window_tokens,
        float8=float8,
    )
    merge_sinks(
        query,
        cache,
        out,
        lse,
        rows,
        scale=scale,
        sink_tokens=sink_tokens,
        window_tokens=window_tokens,
        sink_logits=sink_logits,
    )
