"""A batch in a CPU KV cache with vLLM's metadata for it, and each row's attention by definition."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from flux_vllm.attention_backend.cpu.batch_plan import CpuRoutes
from flux_vllm.batch import Batch
from flux_vllm.router.route import Route
from flux_vllm.routing.prompts import Prompt
from flux_vllm.routing.runtime import FluxRuntime
from tests.helpers.reference_attention import SparsePattern, masked_attention

N, K, H = 4, 2, 32
BLOCK, S, W = 32, 40, 70
PATTERN = SparsePattern(S, W, BLOCK)
LAYERS = 3
FULL, SPARSE, OPEN = int(Route.FULL), int(Route.SPARSE), int(Route.UNDECIDED)
ALL_SPARSE = (SPARSE,) * LAYERS


@dataclass(frozen=True)
class Row:
    """One request of a batch and its routes by layer."""

    computed: int
    scheduled: int
    prompt: int
    routes: tuple[int, ...] = (OPEN,) * LAYERS

    @property
    def is_prefill(self) -> bool:
        return self.computed < self.prompt

    @property
    def end(self) -> int:
        return self.computed + self.scheduled


def make_context(rows: list[Row]) -> Batch:
    return Batch(
        request_ids=tuple(f"r{i}" for i in range(len(rows))),
        prompt_lens=np.array([row.prompt for row in rows]),
        computed=np.array([row.computed for row in rows]),
        scheduled=np.array([row.scheduled for row in rows]),
        is_prefill=np.array([row.is_prefill for row in rows]),
    )


class CpuBatch:
    """A batch in a KV cache, with vLLM's metadata for it."""

    def __init__(self, rows: list[Row]) -> None:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

        self.rows = rows
        used = [-(-row.end // BLOCK) for row in rows]
        num_blocks = sum(used) + 2
        self.poison = num_blocks - 1
        ids = (torch.randperm(num_blocks - 2) + 1).split(used)
        table = torch.full((len(rows), max(used) + 2), self.poison, dtype=torch.int32)
        for row, part in enumerate(ids):
            table[row, : len(part)] = part
        self.cache = torch.full((num_blocks, K, BLOCK, 2 * H), float("nan"))
        self.keys = [torch.randn(row.end, K, H) for row in rows]
        self.values = [torch.randn(row.end, K, H) for row in rows]
        halves = self.cache.view(num_blocks, K, 2 * BLOCK, H).chunk(2, dim=2)
        slot_mapping = []
        for row, key, value, blocks in zip(rows, self.keys, self.values, ids, strict=True):
            self.cache[blocks] = 0  # vLLM's cache begins as zeros: the last block's rest
            positions = torch.arange(row.end)
            slots = blocks[positions // BLOCK] * BLOCK + positions % BLOCK
            ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, "vec")
            slot_mapping.append(slots[row.computed :])
        lens = torch.tensor([row.scheduled for row in rows])
        self.query = torch.randn(int(lens.sum()), N, H)
        self.builder = self._builder()
        start = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
        seq_lens = torch.tensor([row.end for row in rows], dtype=torch.int32)
        self.metadata = CPUAttentionMetadata(
            num_actual_tokens=int(lens.sum()),
            max_query_len=int(lens.max()),
            query_start_loc=start,
            max_seq_len=int(seq_lens.max()),
            seq_lens=seq_lens,
            block_table=table,
            slot_mapping=torch.cat(slot_mapping),
            scheduler_metadata=self.builder.schedule(seq_lens, start),
        )
        self.builder.schedules = 0

    def _builder(self) -> Any:
        from flux_vllm.attention_backend.cpu.backend import FluxCPUMetadataBuilder

        class Builder(SimpleNamespace):
            def schedule(self, *arguments: torch.Tensor) -> torch.Tensor:
                self.schedules += 1
                return FluxCPUMetadataBuilder.schedule(self, *arguments)  # type: ignore[arg-type]

        return Builder(
            block_size=BLOCK,
            num_heads=N,
            num_kv_heads=K,
            head_dim=H,
            dtype=torch.float32,
            isa="vec",
            kv_cache_dtype="auto",
            schedules=0,
        )

    def poison_skipped_blocks(self) -> None:
        """Overwrite what decode rows that are SPARSE in every layer must not read."""
        for row, blocks in zip(self.rows, self.metadata.block_table, strict=True):
            if row.routes == ALL_SPARSE and not row.is_prefill:
                first = max(row.computed - W + 1, 0) // BLOCK
                self.cache[blocks[-(-S // BLOCK) : first].long()] = float("nan")

    def step(self, runtime: FluxRuntime) -> CpuRoutes:
        names = [f"r{index}" for index in range(len(self.rows))]
        runtime.admit(
            Prompt(name, row.prompt, None) for name, row in zip(names, self.rows, strict=True)
        )
        runtime.begin_step(make_context(self.rows))
        return CpuRoutes(runtime, self.metadata, self.builder)

    def expected(self, layer: int) -> torch.Tensor:
        parts = []
        queries = self.query.split([row.scheduled for row in self.rows])
        for row, query, key, value in zip(self.rows, queries, self.keys, self.values, strict=True):
            parts.append(self._expected_row(row, layer, query, key, value))
        return torch.cat(parts)

    @staticmethod
    def _expected_row(
        row: Row, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        route = FULL if row.routes[layer] == OPEN else row.routes[layer]
        q_NTH, k_KTH, v_KTH = (t.transpose(0, 1) for t in (query, key, value))
        if row.is_prefill or row.scheduled == 1:
            phase = "prefill" if row.is_prefill else "decode"
            return masked_attention(q_NTH, k_KTH, v_KTH, 0.3, route, phase, PATTERN)
        # All queries of a speculative row see what the first one's window needs.
        first = max(row.computed - W + 1, 0) // BLOCK * BLOCK
        parts = []
        for index, end in enumerate(range(row.computed + 1, row.end + 1)):
            pattern = SparsePattern(S, end - first, BLOCK)
            one, keys, values = q_NTH[:, index : index + 1], k_KTH[:, :end], v_KTH[:, :end]
            parts.append(masked_attention(one, keys, values, 0.3, route, "decode", pattern))
        return torch.cat(parts)
