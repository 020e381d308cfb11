"""Times one attention layer, routes by layer and by head: part `layer` of bench_head_split."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.row_file import RowFile
from benchmarks.serve_cases import CHUNK, K

SHARE = 0.5
LAYERS, HEADS = "layer_level", "head_split"


@dataclass(frozen=True, slots=True)
class LayerCase:
    """One attention call."""

    batch: int
    queries: int
    """Of each row; 1 is decode."""
    context: int
    caches: int
    """KV caches that the calls go around, so that none is found in the L2 cache."""


LAYER_CASES = (
    LayerCase(1, 1, 32 * K, 12),
    LayerCase(1, 1, 128 * K, 12),
    LayerCase(16, 1, 16 * K, 8),
    LayerCase(16, 1, 32 * K, 4),
    LayerCase(1, CHUNK, 64 * K, 4),
    LayerCase(1, CHUNK, 128 * K, 4),
)


def measure_layer(case: LayerCase, rows: RowFile) -> None:
    """Time one attention layer in all ways."""
    from benchmarks import bench_attention as attention
    from benchmarks.experiments.head_split import HeadSplitKernels
    from flux_vllm.attention_backend.cuda.calls import Sizes
    from flux_vllm.attention_backend.cuda.fa3_calls import FA3Kernels
    from flux_vllm.router.route import Route

    decodes = case.queries == 1
    queries, lengths = [case.queries] * case.batch, [case.context] * case.batch
    batch = attention.Batch(queries, lengths, case.caches, prefill=not decodes)
    calls = [layer_call(batch, layer, decodes) for layer in range(case.caches)]
    kernels = FA3Kernels(
        SimpleNamespace(
            scale=attention.SCALE,
            num_heads=attention.HEADS,
            num_kv_heads=attention.KV_HEADS,
            head_size=attention.HEAD_DIM,
        ),
        Sizes(
            attention.SINK,
            attention.WINDOW,
            torch.cuda.get_device_properties(0).multi_processor_count,
        ),
    )
    split, at_once = HeadSplitKernels(kernels), SideBySide(kernels)
    name = f"{case.batch} x {case.queries} at {case.context // K}K"
    times: dict[str, dict[str, float] | None] = {}

    def measure(what: str, fn: Callable[[int], object]) -> None:
        done = attention.record(what, name, fn, case.caches)
        keys = ("us", "low_us", "high_us")
        times[what] = None if done is None else {key: attention.ROWS[-1][key] for key in keys}

    measure("flash_attn", attention.baseline_decode(batch, 32 if decodes else 0))
    batch.write_views([int(Route.FULL)] * case.batch)
    if decodes:
        measure("full", lambda i: kernels.decode(calls[i]))
    else:
        measure("full", lambda i: kernels.full_pass(calls[i]))
    batch.write_views([int(Route.SPARSE)] * case.batch)
    if decodes:
        measure("sparse", lambda i: kernels.decode(calls[i]))
        measure("head_split", lambda i: split.decode(calls[i]))
        measure("side_by_side", lambda i: at_once.decode(calls[i]))
        short = [attention.SINK + attention.WINDOW] * case.batch
        least = attention.Batch(queries, short, case.caches, prefill=False)
        measure("least", attention.baseline_decode(least, 32))
    else:
        measure("sparse", lambda i: kernels.sink_window_pass(calls[i]))
        measure("head_split", lambda i: split.sink_window_pass(calls[i]))
        measure("side_by_side", lambda i: at_once.sink_window_pass(calls[i]))
        measure("least", lambda i: _window_alone(batch, i, attention.WINDOW, attention.SCALE))
    row = layer_row(case, times)
    rows.keep(("layer_us", case), row, str({k: row[k] for k in (LAYERS, HEADS, "ideal")}))


def layer_row(case: LayerCase, times: dict[str, dict[str, float] | None]) -> dict[str, Any]:
    """Make a row of the times of one layer's calls (microseconds; None for a failed one)."""

    def mean(one: str, other: str) -> float | None:
        pair = times[one], times[other]
        return None if None in pair else statistics.mean(time["us"] for time in pair if time)

    split = times["head_split"]
    return {
        "metric": "layer_us",
        "context": case.context,
        "batch": case.batch,
        "queries": case.queries,
        "sparse_share": SHARE,
        LAYERS: mean("full", "sparse"),
        HEADS: None if split is None else split["us"],
        "ideal": mean("flash_attn", "least"),
        "parts": times,
    }


def layer_call(batch: Any, layer: int, decodes: bool) -> Any:
    """Make the `LayerCall` that the backend would for a batch of `bench_attention`."""
    from flux_vllm.attention_backend.cuda.calls import LayerCall
    from flux_vllm.attention_backend.kernels.decode_views import LayerViews

    metadata = SimpleNamespace(
        query_start_loc=batch.starts,
        seq_lens=batch.lens,
        max_query_len=batch.max_query,
        max_seq_len=batch.max_seq,
        max_num_splits=32 if decodes else 0,  # as vLLM in and out of graphs
    )
    rows = LayerViews(*(buffer[0, : len(batch.lens)] for buffer in batch.per_layer))
    cache = batch.caches[layer]
    return LayerCall(
        batch.query, cache, batch.out, metadata, batch.table2, batch.per_layer, 0, rows
    )


class SideBySide:
    """Split heads whose two calls run at once.

    Args:
        kernels: that attend.
    """

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._stream = torch.cuda.Stream()

    def decode(self, call: Any) -> None:
        """Attend a batch without prefill rows."""
        from benchmarks.experiments.head_split import halves

        full, routed = halves(call)
        self._both(lambda: self._kernels.decode(full), lambda: self._kernels.decode(routed))

    def sink_window_pass(self, call: Any) -> None:
        """Attend SPARSE prefill rows."""
        from benchmarks.experiments.head_split import halves

        full, routed = halves(call)
        rows, metadata = full.rows.sparse_seqused_q, call.metadata
        start, longest = metadata.query_start_loc, metadata.max_query_len
        self._both(
            lambda: self._kernels.every_key_pass(full, start, rows, longest),
            lambda: self._kernels.sink_window_pass(routed),
        )

    def _both(self, here: Callable[[], None], beside: Callable[[], None]) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            beside()
        here()
        current.wait_stream(self._stream)


def _window_alone(batch: Any, layer: int, window_tokens: int, scale: float) -> torch.Tensor:
    from flux_vllm.attention_backend.kernels import fa3

    return fa3.attend(
        batch.query,
        batch.caches[layer],
        batch.out,
        batch.rows_of(batch.lens),
        max_query_len=batch.max_query,
        max_seq_len=batch.max_seq,
        scale=scale,
        window_tokens=window_tokens,
    )
