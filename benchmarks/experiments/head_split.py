"""Head-level routes, for comparison: in each layer half of the KV head groups attend FULL.

The usual alternative to a route per layer. The first half of a layer's KV heads, with the query
heads that read them, attend to every key; the other half follow the layer's route. With all layers
SPARSE the sparsity is that of half of the layers. As in published head-level methods, each layer
makes two attention calls on slices of the heads, one after the other.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from benchmarks.worker_extension import BenchmarkWorker
from flux_vllm.attention_backend.cuda import backend as cuda
from flux_vllm.attention_backend.cuda.calls import Kernels, LayerCall, Limits, Variants
from flux_vllm.attention_backend.cuda.choose import choose_kernels
from flux_vllm.attention_backend.cuda.views import ViewBuffers
from flux_vllm.attention_backend.kernels.decode_views import LayerViews
from flux_vllm.attention_backend.kernels.paged import KVCache


class HeadSplitKernels:
    """A `Kernels` that hands each call to another one twice, for either half of the heads.

    Args:
        kernels: that attend.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.scale = kernels.scale

    def variants(self, limits: Limits) -> Variants:
        """Return those of the kernels that attend."""
        return self._kernels.variants(limits)

    def plan(self, views: ViewBuffers, metadata: Any) -> None:
        """Plan nothing: FA3 plans each half's call in the call."""

    def decode(self, call: LayerCall) -> None:
        """Attend a batch without prefill rows."""
        for half in halves(call):
            self._kernels.decode(half)

    def full_pass(self, call: LayerCall) -> None:
        """Attend decode rows, and prefill rows that are FULL or short."""
        for half in halves(call):
            self._kernels.full_pass(half)

    def every_key_pass(
        self,
        call: LayerCall,
        query_start_loc: torch.Tensor,
        seqused_q: torch.Tensor,
        max_query_len: int,
    ) -> None:
        """Attend some rows' last queries to every key up to their own, all heads alike."""
        self._kernels.every_key_pass(call, query_start_loc, seqused_q, max_query_len)

    def sink_window_pass(self, call: LayerCall) -> None:
        """Attend the other prefill rows: FULL heads to every key, the others to sinks, window."""
        full, routed = halves(call)
        rows, metadata = full.rows.sparse_seqused_q, call.metadata
        self._kernels.every_key_pass(full, metadata.query_start_loc, rows, metadata.max_query_len)
        self._kernels.sink_window_pass(routed)


def halves(call: LayerCall) -> tuple[LayerCall, LayerCall]:
    """Slice a layer's call: (heads that attend to every key, heads that follow the route).

    Raises: ValueError: an odd number of KV heads.
    """
    heads, kv_heads = call.query.shape[1], call.cache.keys.shape[2]
    if kv_heads % 2:
        raise ValueError(
            f"head split: expected an even number of KV heads, found {kv_heads}; choose another "
            "model or tensor-parallel size"
        )

    def part(chosen: int) -> LayerCall:
        queries = slice(chosen * heads // 2, (chosen + 1) * heads // 2)
        groups = slice(chosen * kv_heads // 2, (chosen + 1) * kv_heads // 2)
        return replace(
            call,
            query=call.query[:, queries],
            cache=KVCache(call.cache.keys[:, :, groups], call.cache.values[:, :, groups]),
            out=call.out[:, queries],
        )

    return replace(part(0), rows=_real_rows(call)), part(1)


def _real_rows(call: LayerCall) -> LayerViews:
    """Let all rows read their real table rows.

    Which rows are whose in a batch with prefill stays as the layer has it.
    """
    numbers = _row_numbers(len(call.table) // 2, call.query.device)
    seq_lens = call.metadata.seq_lens
    return call.rows._replace(kv_batch_idx=numbers[: len(seq_lens)], seqused_k=seq_lens)


@cache
def _row_numbers(capacity: int, device: torch.device) -> torch.Tensor:
    return torch.arange(capacity, dtype=torch.int32, device=device)


class HeadSplitWorker(BenchmarkWorker):
    """A worker whose layers split their heads, in decode graphs too."""

    @staticmethod
    def init_worker_extension(worker: Any) -> None:
        """Install the split; vLLM calls this before it loads the model."""

        def split(*args: Any) -> Kernels:
            return HeadSplitKernels(choose_kernels(*args))

        cuda.choose_kernels = split

    def check_heads_are_split(self: Any) -> None:
        """Raise unless every layer has attended with split heads.

        Raises: RuntimeError: some have not.
        """
        context = self.model_runner.vllm_config.compilation_config.static_forward_context
        for name, layer in context.items():
            found = type(getattr(layer.impl, "kernels", None)).__name__
            if found != HeadSplitKernels.__name__:
                raise RuntimeError(
                    f"head split: expected {HeadSplitKernels.__name__} in {name}, found {found}; "
                    "it runs on CUDA with --attention-backend flux and vLLM 0.33"
                )
