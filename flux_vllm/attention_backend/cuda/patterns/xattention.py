"""XAttention on CUDA: estimate, choose and attend by kernels; nothing comes back to the host.

Dimension legend: N query heads, K kv heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from flux_vllm.attention_backend.cuda.calls import Kernels, LayerCall
from flux_vllm.attention_backend.kernels import block_rows, fa3
from flux_vllm.attention_backend.kernels.block_choice import LEAST_WIDTH, choose_blocks
from flux_vllm.attention_backend.kernels.block_lists import BlockLists
from flux_vllm.attention_backend.kernels.block_rows import (
    BlockRows,
    attend_block_rows,
    make_block_rows,
)
from flux_vllm.attention_backend.kernels.block_sparse import attend_blocks
from flux_vllm.attention_backend.kernels.block_tasks import pack_block_tasks
from flux_vllm.attention_backend.kernels.paged import PagedRows
from flux_vllm.attention_backend.kernels.strided_scores import score_blocks, tasks_a_program
from flux_vllm.batch import Batch
from flux_vllm.patterns import xattention
from flux_vllm.patterns.xattention import BLOCK
from flux_vllm.transfer import to_device


def plan(pattern: xattention.Pattern, batch: Batch, device: torch.device) -> "BlockPrefill":
    """Plan a batch by query blocks."""
    return BlockPrefill(pattern, batch, device)


def long_contexts(max_len: int) -> list[int]:
    """Return one length for each width of a query block's choice."""
    lengths, blocks = [], LEAST_WIDTH
    while blocks * BLOCK < max_len:
        lengths.append(blocks * BLOCK + 1)
        blocks *= 2
    return lengths


def nbytes(
    pattern: xattention.Pattern, num_heads: int, max_tokens: int, max_len: int, head_nbytes: int
) -> int:
    """Return what slices of heads take, of one prompt at its end or of many short chunks."""
    tasks, blocks = -(-max_tokens // BLOCK) + 1, -(-max_len // BLOCK)
    # All heads may share one KV head, and chunks of one query are a task each.
    of_task = num_heads * blocks * _entry_nbytes(pattern)
    lists = min(of_task * max_tokens, max(block_rows.SLICE_NBYTES, of_task * tasks))
    if not fa3.is_available():
        return lists
    all_heads = block_rows.slice_nbytes(num_heads, max_tokens, blocks, head_nbytes)
    one_head = block_rows.slice_nbytes(1, tasks, blocks, head_nbytes)
    return lists + min(all_heads, max(block_rows.SLICE_NBYTES, one_head))


def _entry_nbytes(pattern: xattention.Pattern) -> int:
    """Bytes that a query block's lists take for each key block up to it, by query head."""
    return 4 * (BLOCK // pattern.stride) + 4


class BlockPrefill:
    """A batch; lists of blocks are made on the device and stay there."""

    def __init__(self, pattern: xattention.Pattern, batch: Batch, device: torch.device) -> None:
        self._pattern = pattern
        self._batch = batch
        self._device = device
        self._buffers: _Buffers | None = None

    def attend(self, call: LayerCall, kernels: Kernels) -> None:
        """Estimate, choose and attend, a slice of heads after the other."""
        buffers = self._buffers
        if buffers is None:
            buffers = self._buffers = self._make_buffers(call, kernels.name == "fa3")
        metadata, pattern = call.metadata, self._pattern
        seqused_q = call.rows.sparse_seqused_q
        rows = PagedRows(
            metadata.block_table, None, metadata.query_start_loc, metadata.seq_lens, seqused_q
        )
        kv_heads = call.cache.keys.shape[2]
        group = call.query.shape[1] // kv_heads
        for first in range(0, kv_heads, buffers.kv_heads):
            of_kv = slice(first, min(first + buffers.kv_heads, kv_heads))
            of_query = slice(of_kv.start * group, of_kv.stop * group)
            query, out = call.query[:, of_query], call.out[:, of_query]
            cache = call.cache._replace(
                keys=call.cache.keys[:, :, of_kv], values=call.cache.values[:, :, of_kv]
            )
            by_head = (buffers.lse, buffers.chosen, buffers.counts)
            lse, chosen, counts = (buffer[: query.shape[1]] for buffer in by_head)
            sinks = None if kernels.sink_logits is None else kernels.sink_logits[of_query]
            score_blocks(
                query,
                cache,
                rows,
                buffers.tasks,
                lse,
                most_blocks=buffers.most_blocks,
                scale=kernels.scale,
                stride=pattern.stride,
            )
            choose_blocks(
                lse,
                buffers.tasks,
                seqused_q,
                metadata.seq_lens,
                chosen,
                counts,
                most_blocks=buffers.most_blocks,
                threshold=pattern.threshold,
                stride=pattern.stride,
            )
            lists = BlockLists(
                rows.block_table,
                rows.query_start_loc,
                seqused_q,
                rows.seqused_k,
                buffers.tasks,
                chosen,
                counts,
            )
            attend: Callable[..., None] = attend_blocks
            if buffers.rows is not None:
                float8 = call.float8
                if float8 is not None:
                    float8 = float8._replace(query=float8.query[:, of_query])
                attend = partial(attend_block_rows, rows=buffers.rows, float8=float8)
            attend(query, cache, out, lists, scale=kernels.scale, sink_logits=sinks)

    def _make_buffers(self, call: LayerCall, by_fa3: bool) -> "_Buffers":
        """Plan the step, in its first layer that needs it."""
        batch, (_, block_size, kv_heads, _) = self._batch, call.cache.keys.shape
        group = call.query.shape[1] // kv_heads
        together = tasks_a_program(group, call.query.element_size(), self._pattern.stride)
        packed = pack_block_tasks(batch.computed, batch.scheduled, batch.is_prefill, together)
        rows, entries = BLOCK // self._pattern.stride, packed.num_entries
        most_blocks = packed.most_blocks
        of_kv_head = group * entries * _entry_nbytes(self._pattern)
        kv_heads = max(1, min(kv_heads, block_rows.SLICE_NBYTES // of_kv_head))
        heads = kv_heads * group
        query = call.query[:, :heads]
        rows_of_fa3 = None
        if by_fa3:
            dtype = None if call.float8 is None else call.float8.query.dtype
            rows_of_fa3 = make_block_rows(packed.tasks, query, block_size, most_blocks, dtype)
        return _Buffers(
            kv_heads,
            to_device(packed.tasks, self._device),
            torch.empty(heads, entries * rows, device=self._device),
            torch.empty(heads, entries, dtype=torch.int32, device=self._device),
            torch.empty(heads, len(packed.tasks), dtype=torch.int32, device=self._device),
            most_blocks,
            rows_of_fa3,
        )


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Of a step, used by one slice of heads after the other in every layer; see the kernels."""

    kv_heads: int
    """Of a slice."""
    tasks: torch.Tensor
    lse: torch.Tensor
    chosen: torch.Tensor
    counts: torch.Tensor
    most_blocks: int
    rows: BlockRows | None
    """Of FlashAttention-3; None where Triton attends."""
