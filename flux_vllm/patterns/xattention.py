"""XAttention: each query block attends to the key blocks that hold most of its estimated attention.

Queries and keys lie in blocks of 128 positions, counted from position 0 of the request. Attention
between a query block and the key blocks up to it is estimated from sums along anti-diagonals of
stride x stride products, and the fewest key blocks are kept whose mass reaches the threshold; the
first block (the sinks) and the query block's own are always among them. Each query head chooses for
itself, also where heads share keys. Source: arXiv 2503.16428.

A chunk that begins or ends within a block has a part of that block's queries, and they choose for
themselves; the keys are always all that the request has. Decode is sinks and window.

Dimension legend: R requests, Q queries of a chunk, S keys, N query heads, K kv heads, H head dim,
G strided rows a block (128 / stride).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from flux_vllm.batch import Batch
from flux_vllm.patterns.base import (
    Chunk,
    CpuPrefill,
    CudaPrefill,
    SparsePattern,
    option_error,
)
from flux_vllm.transfer import to_device

if TYPE_CHECKING:
    from flux_vllm.attention_backend.cpu.pages import PageLayout
    from flux_vllm.attention_backend.cuda.calls import Kernels, LayerCall
    from flux_vllm.attention_backend.kernels.block_rows import BlockRows

BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Pattern(SparsePattern):
    """Block-sparse prefill; `sink_tokens` and `window_tokens` are of decode alone."""

    threshold: float = 0.9
    """Share of the estimated attention that the kept blocks hold."""
    stride: int = 16
    """Of the anti-diagonals: smaller is more exact and costs more."""

    def __post_init__(self) -> None:
        if type(self.threshold) not in (int, float) or not 0 < self.threshold <= 1:
            raise option_error("threshold", "a number above 0 and at most 1", self.threshold)
        if self.stride not in (8, 16):
            raise option_error("stride", "8 or 16", self.stride)

    @property
    def is_local(self) -> bool:
        """A query's blocks may lie anywhere."""
        return False

    @property
    def reach(self) -> int:
        """The first block and the second."""
        return 2 * BLOCK

    def visible(
        self, query: torch.Tensor, key: torch.Tensor, prompt_len: int, scale: float
    ) -> torch.Tensor:
        """Build the mask [N, Q, S], product by product."""
        heads, group = query.shape[1], query.shape[1] // key.shape[1]
        start, end = len(key) - len(query), len(key)
        mask = torch.zeros(heads, len(query), end, dtype=torch.bool)
        for head in range(heads):
            padded = torch.zeros(-(-end // BLOCK) * BLOCK, 2, query.shape[2])
            padded[start:end, 0] = query[:, head].float()
            padded[:end, 1] = key[:, head // group].float()
            for block in range(start // BLOCK, -(-end // BLOCK)):
                kept = self._kept(padded, block, start, end, scale)
                for position in range(max(start, block * BLOCK), min(end, (block + 1) * BLOCK)):
                    for key_block in kept:
                        seen = slice(key_block * BLOCK, min(position, key_block * BLOCK + 127) + 1)
                        mask[head, position - start, seen] = True
        return mask

    def _kept(
        self, padded: torch.Tensor, block: int, start: int, end: int, scale: float
    ) -> list[int]:
        """Choose a query block's key blocks, from queries and keys [positions, 2, H] by grid."""
        mass = [0.0] * (block + 1)
        rows = range(block * BLOCK // self.stride, (block + 1) * BLOCK // self.stride)
        # Strided rows that have a query in the chunk.
        present = [
            r for r in rows if r * self.stride + self.stride > start and r * self.stride < end
        ]
        for row in present:
            scores = []
            for column in range(row + 1):
                queries = padded[row * self.stride : (row + 1) * self.stride, 0]
                keys = padded[column * self.stride : (column + 1) * self.stride, 1]
                scores.append((queries.flip(0) * keys).sum() * scale / self.stride)
            for column, weight in enumerate(torch.stack(scores).softmax(dim=0).tolist()):
                mass[column * self.stride // BLOCK] += weight
        kept = sorted({0, block})
        others = sorted(range(1, block), key=lambda other: -mass[other])
        while sum(mass[b] for b in kept) < self.threshold * len(present) and others:
            kept.append(others.pop(0))
        return kept

    def prefill_keys(self, batch: Batch) -> None:
        """Give nothing: the blocks kept depend on the data, and are known on the device alone."""
        return

    def cpu_prefill(self, chunk: Chunk) -> CpuPrefill:
        """Plan a chunk by query blocks, in torch."""
        return _CpuBlocks(self, chunk)

    def cuda_prefill(self, batch: Batch, device: torch.device) -> CudaPrefill:
        """Plan a batch by query blocks: estimate, choose, attend."""
        return _CudaBlocks(self, batch, device)

    def cuda_nbytes(self, num_heads: int, max_tokens: int, max_len: int, head_nbytes: int) -> int:
        """Return what slices of heads take, of one prompt at its end or of many short chunks."""
        from flux_vllm.attention_backend.kernels import block_rows, fa3

        tasks, blocks = -(-max_tokens // BLOCK) + 1, -(-max_len // BLOCK)
        # All heads may share one KV head, and chunks of one query are a task each.
        of_task = num_heads * blocks * self.entry_nbytes
        lists = min(of_task * max_tokens, max(block_rows.SLICE_NBYTES, of_task * tasks))
        if not fa3.is_available():
            return lists
        all_heads = block_rows.slice_nbytes(num_heads, max_tokens, blocks, head_nbytes)
        one_head = block_rows.slice_nbytes(1, tasks, blocks, head_nbytes)
        return lists + min(all_heads, max(block_rows.SLICE_NBYTES, one_head))

    @property
    def entry_nbytes(self) -> int:
        """Bytes that a query block's lists take for each key block up to it, by query head."""
        return 4 * (BLOCK // self.stride) + 4


class _CpuBlocks:
    """One chunk on the CPU: SDPA by query block over the blocks that any head kept."""

    def __init__(self, pattern: Pattern, chunk: Chunk) -> None:
        self._pattern = pattern
        self._start = chunk.computed
        self._end = chunk.computed + chunk.scheduled
        self._pages = chunk.block_row[: -(-self._end // chunk.block_size)].long()

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: "PageLayout",
        scale: float,
        output: torch.Tensor,
    ) -> None:
        start, end = self._start, self._end
        keys, values = layout.gather(kv_cache, self._pages)
        grid = functional.pad(keys[:, :end].float(), (0, 0, 0, -end % BLOCK))
        strided_keys = grid.unflatten(1, (-1, self._pattern.stride)).flatten(2)
        for block in range(start // BLOCK, -(-end // BLOCK)):
            first, stop = max(start, block * BLOCK), min(end, (block + 1) * BLOCK)
            tile = query[first - start : stop - start].transpose(0, 1)
            kept = self._choose(tile, strided_keys, block, first, scale)
            blocks = kept.any(dim=0).nonzero()
            picked = (blocks * BLOCK + torch.arange(BLOCK)).flatten()
            picked = picked[picked < stop]
            causal = picked <= torch.arange(first, stop)[:, None]
            attended = functional.scaled_dot_product_attention(
                tile[None],
                keys[None, :, picked],
                values[None, :, picked],
                attn_mask=kept[:, None, picked // BLOCK] & causal,
                scale=scale,
                enable_gqa=True,
            )
            output[first - start : stop - start] = attended[0].transpose(0, 1)

    def _choose(
        self, tile: torch.Tensor, strided_keys: torch.Tensor, block: int, first: int, scale: float
    ) -> torch.Tensor:
        """Choose a query block's key blocks.

        Args:
            tile: [N, queries, H], from position `first` on.
            strided_keys: [K, strided keys, stride * H] float32.
            block: of the queries.
            first: position.
            scale: of the scores.

        Returns: [N, block + 1] bool.
        """
        stride, threshold = self._pattern.stride, self._pattern.threshold
        heads, queries, _ = tile.shape
        kv_heads, rows = len(strided_keys), BLOCK // stride
        before = first - block * BLOCK
        grid = functional.pad(tile.float(), (0, 0, before, BLOCK - before - queries))
        strided = grid.unflatten(1, (rows, stride)).flip(2).flatten(2)
        columns = (block + 1) * rows
        scores = strided.view(kv_heads, -1, strided.shape[2]) @ strided_keys[:, :columns].transpose(
            1, 2
        )
        scores = scores.view(heads, rows, columns) * (scale / stride)
        row = torch.arange(rows)
        later = torch.arange(columns) > (block * rows + row)[:, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        # Strided rows without a query of the chunk do not count.
        present = (row * stride + stride > before) & (row * stride < before + queries)
        mass = weights[:, present].sum(dim=1).view(heads, block + 1, rows).sum(dim=-1)

        kept = torch.zeros(heads, block + 1, dtype=torch.bool)
        kept[:, 0] = kept[:, block] = True
        needed = threshold * present.sum() - (mass * kept).sum(dim=-1, keepdim=True)
        others, order = mass.masked_fill(kept, 0).sort(dim=-1, descending=True)
        # One is needed as long as those before it do not suffice.
        wanted = others.cumsum(dim=-1) - others < needed
        return kept | torch.zeros_like(kept).scatter(1, order, wanted)


class _CudaBlocks:
    """A batch on CUDA; lists of blocks are made on the device and stay there."""

    def __init__(self, pattern: Pattern, batch: Batch, device: torch.device) -> None:
        self._pattern = pattern
        self._batch = batch
        self._device = device
        self._buffers: _Buffers | None = None

    def attend(self, call: "LayerCall", kernels: "Kernels") -> None:
        from flux_vllm.attention_backend.cuda.calls import FA3Kernels
        from flux_vllm.attention_backend.kernels.block_choice import choose_blocks
        from flux_vllm.attention_backend.kernels.block_rows import BlockLists, attend_block_rows
        from flux_vllm.attention_backend.kernels.block_sparse import attend_blocks
        from flux_vllm.attention_backend.kernels.strided_scores import score_blocks

        buffers = self._buffers
        if buffers is None:
            buffers = self._buffers = self._make_buffers(call, isinstance(kernels, FA3Kernels))
        metadata, pattern = call.metadata, self._pattern
        seqused_q = call.rows.sparse_seqused_q
        rows = (metadata.block_table, metadata.query_start_loc, seqused_q, metadata.seq_lens)
        kv_heads = call.keys.shape[2]
        group = call.query.shape[1] // kv_heads
        for first in range(0, kv_heads, buffers.kv_heads):
            of_kv = slice(first, min(first + buffers.kv_heads, kv_heads))
            of_query = slice(of_kv.start * group, of_kv.stop * group)
            query, out = call.query[:, of_query], call.out[:, of_query]
            keys, values = call.keys[:, :, of_kv], call.values[:, :, of_kv]
            by_head = (buffers.lse, buffers.chosen, buffers.counts)
            lse, chosen, counts = (buffer[: query.shape[1]] for buffer in by_head)
            score_blocks(
                query,
                keys,
                *rows,
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
            lists = BlockLists(*rows, buffers.tasks, chosen, counts)
            if buffers.rows is None:
                attend_blocks(query, keys, values, out, *lists, scale=kernels.scale)
            else:
                attend_block_rows(
                    query, keys, values, out, lists, buffers.rows, scale=kernels.scale
                )

    def _make_buffers(self, call: "LayerCall", by_fa3: bool) -> "_Buffers":
        """Plan the step, in its first layer that needs it."""
        from flux_vllm.attention_backend.kernels.block_rows import SLICE_NBYTES, make_block_rows
        from flux_vllm.attention_backend.kernels.block_tasks import pack_block_tasks
        from flux_vllm.attention_backend.kernels.strided_scores import tasks_a_program

        batch, (_, block_size, kv_heads, _) = self._batch, call.keys.shape
        group = call.query.shape[1] // kv_heads
        together = tasks_a_program(group, call.query.element_size(), self._pattern.stride)
        packed = pack_block_tasks(batch.computed, batch.scheduled, batch.is_prefill, together)
        rows, entries = BLOCK // self._pattern.stride, packed.num_entries
        most_blocks = packed.most_blocks
        of_kv_head = group * entries * self._pattern.entry_nbytes
        kv_heads = max(1, min(kv_heads, SLICE_NBYTES // of_kv_head))
        heads = kv_heads * group
        query = call.query[:, :heads]
        return _Buffers(
            kv_heads,
            to_device(packed.tasks, self._device),
            torch.empty(heads, entries * rows, device=self._device),
            torch.empty(heads, entries, dtype=torch.int32, device=self._device),
            torch.empty(heads, len(packed.tasks), dtype=torch.int32, device=self._device),
            most_blocks,
            make_block_rows(packed.tasks, query, block_size, most_blocks) if by_fa3 else None,
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
    rows: "BlockRows | None"
    """Of FlashAttention-3; None where Triton attends."""
