"""Every kernel that serving can call, called before the first request.

Kernels are compiled or loaded when they are first called, which takes up to a second each. Here
made-up batches, one for each variant, go through the real builders and layers. vLLM's own warm-up
follows, whose prompts are too short to be routed, and then its graphs are captured.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from flux_vllm.attention_backend.cuda.calls import DecodeCase, Limits, Variants
from flux_vllm.attention_backend.cuda.memory import most_rows
from flux_vllm.attention_backend.cuda.patterns import long_contexts
from flux_vllm.batch import Batch
from flux_vllm.routing.prompts import Prompt
from flux_vllm.routing.runtime import FluxRuntime

logger = logging.getLogger("vllm.flux")


@torch.inference_mode()  # as vLLM's steps, whose tensors nothing else may write to
def warm_up(builder: Any, layer: Any, runtime: FluxRuntime, runner: Any) -> None:
    """Call every kernel of ours that a batch can need, in a worker that is about to serve.

    Args:
        builder: of the metadata of a KV cache group.
        layer: of the group; layers that share its views are like it.
        runtime: of the worker.
        runner: vLLM's model runner, V1 or V2, with its KV cache.

    Host sync: waits for the device at the end.
    """
    begin = time.monotonic()
    config = builder.vllm_config
    limits = Limits(
        config.scheduler_config.max_num_seqs,
        most_rows(config),
        config.scheduler_config.max_num_batched_tokens,
        runtime.step_tokens,
    )
    batches = _Batches(builder, layer, _block_table(runner, builder), runtime)
    number = batches.run(layer.impl.kernels.variants(limits))
    torch.cuda.synchronize()
    logger.info(
        "flux: kernels for all batches are loaded: %d batches in %.1f s",
        number,
        time.monotonic() - begin,
    )


def _block_table(runner: Any, builder: Any) -> torch.Tensor:
    """Return the table [max_num_seqs, M] of a builder's group, as its steps get it."""
    number = next(
        number
        for number, groups in enumerate(runner.attn_groups)
        if any(group.get_metadata_builder(0) is builder for group in groups)
    )
    if hasattr(runner, "block_tables"):  # V2
        table: torch.Tensor = runner.block_tables.input_block_tables[number]
        return table
    table = runner.input_batch.block_table[number].get_device_tensor(runner.max_num_reqs)
    return table


class _Batches:
    """Made-up batches of layers that are alike; the arguments are those of `warm_up`."""

    def __init__(
        self, builder: Any, layer: Any, block_table: torch.Tensor, runtime: FluxRuntime
    ) -> None:
        self._builder = builder
        self._layer = layer
        self._block_table = block_table
        self._runtime = runtime
        self._max_len = builder.vllm_config.model_config.max_model_len
        self._dtype = builder.vllm_config.model_config.dtype

    def run(self, variants: Variants) -> int:
        """Run a batch of each variant. Returns: how many."""
        for case in variants.decode:
            self._decode(case)
        lengths = [0, *long_contexts(self._runtime.pattern, self._max_len)]
        for tokens in variants.prefill:
            for length in lengths:
                self._prefill(tokens, length)
        return len(variants.decode) + len(variants.prefill) * len(lengths)

    def _decode(self, case: DecodeCase) -> None:
        queries = [case.queries] * case.rows
        self._attend(queries, queries, case.max_query_len)

    def _prefill(self, tokens: int, length: int) -> None:
        """Prefill the end of prompts that are long enough to be routed, or of such a length."""
        runtime = self._runtime
        rows = -(-tokens // self._max_len)
        queries = [tokens // rows] * rows
        beyond = max(length, runtime.sink_tokens + runtime.window_tokens + 1, queries[0])
        length = min(beyond, self._max_len)
        with _requests(runtime, rows, length) as names:
            scheduled = np.array(queries, dtype=np.int64)
            lengths = np.full(rows, length)
            is_prefill = np.ones(rows, dtype=bool)
            runtime.begin_step(
                Batch(names, lengths, lengths - scheduled, scheduled, is_prefill, is_warmup=True)
            )
            self._attend(queries, lengths.tolist(), max(queries))
            runtime.end_step()

    def _attend(self, queries: list[int], lengths: list[int], max_query_len: int) -> None:
        """Build the metadata of a batch, and attend in one layer."""
        device, impl = self._block_table.device, self._layer.impl
        starts = torch.tensor([0, *np.cumsum(queries).tolist()], dtype=torch.int32)
        tokens = sum(queries)
        metadata = self._builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts.to(device),
                query_start_loc_cpu=starts,
                seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
                num_reqs=len(queries),
                num_actual_tokens=tokens,
                max_query_len=max_query_len,
                max_seq_len=max(lengths),
                block_table_tensor=self._block_table[: len(queries)],
                slot_mapping=torch.full((tokens,), -1, dtype=torch.int64, device=device),
            ),
        )
        shape = tokens, impl.num_heads, impl.head_size
        query = torch.zeros(shape, dtype=self._dtype, device=device)
        out = torch.empty_like(query).flatten(1)
        impl.forward(self._layer, query, None, None, self._layer.kv_cache, metadata, out)


@contextmanager
def _requests(runtime: FluxRuntime, rows: int, length: int) -> Iterator[tuple[str, ...]]:
    """Let requests with prompts of a length be routed, and end them."""
    names = tuple(f"_flux_warm_up_{row}" for row in range(rows))
    # Without tokens to probe: pipeline stages probe together, and need not warm up alike.
    runtime.admit(Prompt(name, length, None) for name in names)
    runtime.decide_due(dict.fromkeys(names, length))
    try:
        yield names
    finally:
        runtime.finish(names)
