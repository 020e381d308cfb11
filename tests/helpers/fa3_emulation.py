"""FlashAttention-3's operator in plain float32 torch, over the same views.

It takes what `flux_vllm.attention_backend.kernels.fa3.attend` takes, checks what the operator
checks (hopper/flash_api.cpp), and reads no table entry and no key that the operator would not.
"""

import torch

from flux_vllm.attention_backend.kernels.fa3 import Float8Operands
from flux_vllm.attention_backend.kernels.paged import KVCache, PagedRows


def attend(
    query: torch.Tensor,
    cache: KVCache,
    out: torch.Tensor,
    paged: PagedRows,
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
    """Attend as `fa3.attend` says; no window, no work plan."""
    assert window_tokens is None
    assert scheduler_metadata is None
    key_cache, value_cache = cache[:2]
    block_table, kv_batch_idx, query_start_loc, seqused_k, seqused_q = paged
    rows, (tokens, heads, head_dim) = len(query_start_loc) - 1, query.shape
    pages, page_tokens, kv_heads, _ = key_cache.shape
    assert key_cache.shape == value_cache.shape
    assert page_tokens % 16 == 0
    assert head_dim % 8 == 0
    assert out.shape == query.shape
    descales = torch.ones(3, rows, kv_heads)
    if float8 is None:
        assert query.dtype == out.dtype
        assert query.dtype in (torch.float16, torch.bfloat16)
    else:
        query = float8.query
        assert query.dtype == torch.float8_e4m3fn
        assert out.dtype == torch.bfloat16
        assert out.shape == query.shape
        descales = torch.stack(float8.descales(rows, kv_heads))
        assert descales.shape == (3, rows, kv_heads)
    assert query.dtype == key_cache.dtype == value_cache.dtype
    assert all(t.stride(-1) == 1 for t in (query, key_cache, value_cache, out, block_table))
    assert kv_batch_idx is not None or len(block_table) == rows
    if sink_logits is not None:
        assert sink_logits.shape == (heads,)
        assert sink_logits.dtype == torch.bfloat16
    for lengths, size in ((query_start_loc, rows + 1), (seqused_k, rows), (seqused_q, rows)):
        if lengths is not None:
            assert lengths.shape == (size,)
            assert lengths.is_contiguous()
            assert lengths.dtype == torch.int32
    lse = torch.full((heads, tokens), float("nan"))
    starts = query_start_loc.tolist()
    for row in range(rows):
        start, keys = starts[row], int(seqused_k[row])
        queries = starts[row + 1] - start if seqused_q is None else int(seqused_q[row])
        if queries == 0:
            continue
        assert 0 < queries <= max_query_len
        assert queries <= keys <= max_seq_len
        assert start + queries <= tokens
        mine = block_table[row if kv_batch_idx is None else int(kv_batch_idx[row])]
        used = mine[: -(-keys // page_tokens)].long()
        assert ((used >= 0) & (used < pages)).all(), f"row {row}: a page outside the cache"
        k, v = (
            part[used].flatten(0, 1)[:keys].float() * descale[row][:, None]
            for part, descale in zip((key_cache, value_cache), descales[1:], strict=True)
        )
        q = query[start : start + queries].float()
        q = q * descales[0, row].repeat_interleave(heads // kv_heads)[:, None]
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) * scale
        later = torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]
        scores.masked_fill_(later, float("-inf"))
        if sink_logits is not None:
            beside = sink_logits.float()[:, None, None].expand(-1, queries, 1)
            scores = torch.cat([scores, beside], dim=-1)
        weights = scores.softmax(dim=-1)[..., :keys]
        attended = torch.einsum("nqk,knh->qnh", weights, v)
        out[start : start + queries] = attended.to(out.dtype)
        if sink_logits is None:  # with learned sinks nothing is promised of it
            lse[:, start : start + queries] = scores.logsumexp(dim=-1)
    return lse
