"""The views of a worker, which the builders of all its KV cache groups share."""

from typing import Any
from weakref import WeakKeyDictionary

import torch

from flux_vllm.attention_backend.cuda.views import GroupViews, ViewBuffers
from flux_vllm.attention_backend.kernels.decode_views import ViewSizes
from flux_vllm.routing.decode_counts import DecodeCounts
from flux_vllm.routing.runtime import FluxRuntime

_Kind = tuple[int, int, int]

_views: WeakKeyDictionary[FluxRuntime, dict[_Kind, ViewBuffers]] = WeakKeyDictionary()
"""Of each worker in this process."""


def kind_of(layer: Any, block_size: int) -> _Kind:
    """Return what layers that share views have in common: block size, KV heads, head size."""
    return block_size, layer.impl.num_kv_heads, layer.impl.head_size


def join_views(
    layers: list[Any], block_size: int, capacity: int, device: torch.device
) -> GroupViews:
    """Give a KV cache group its part of its worker's views.

    Args:
        layers: of the group, at least one, bound to a runtime.
        block_size: tokens a block.
        capacity: most rows of a batch, padding included.
        device: of the KV cache.

    Returns: GroupViews. vLLM makes its builders twice, to measure and to serve: layers that come
        again begin new views.
    """
    runtime = layers[0].impl.binding.runtime
    columns = [layer.impl.binding.layer for layer in layers]
    if runtime.decode_counts is None:
        runtime.decode_counts = DecodeCounts(capacity, device)
    kinds = _views.setdefault(runtime, {})
    kind = kind_of(layers[0], block_size)
    views = kinds.get(kind)
    if views is None or views.holds(columns):
        sizes = ViewSizes(
            block_size,
            runtime.sink_tokens,
            runtime.window_tokens,
            runtime.pattern.reach,
            runtime.config.sparse_prefill,
        )
        views = kinds[kind] = ViewBuffers(
            capacity,
            runtime.table.num_layers,
            sizes,
            runtime.decode_counts,
            device,
            decodes_fully=runtime.full_decode_tokens > 0,
        )
    return views.join(columns, [column in runtime.routed_layers for column in columns])
