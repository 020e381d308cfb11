"""vLLM's KVCacheManager over FULL groups and clusters of SPARSE layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)

from flux_vllm.hooks.wrap import wrap_object
from flux_vllm.kv.coordinator import FluxCoordinator
from flux_vllm.kv.register import register
from flux_vllm.kv.spec import FluxSpec

BLOCK_SIZE, SINK_TOKENS, WINDOW_TOKENS = 16, 20, 50
MAX_MODEL_LEN, CHUNK_TOKENS = 1024, 96

FULL = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)


def sparse_spec(cluster: int = 0, is_local: bool = True, **changes: Any) -> FluxSpec:
    """Make the spec of a cluster."""
    sizes = {"sink_tokens": SINK_TOKENS, "window_tokens": WINDOW_TOKENS} | changes
    return FluxSpec.of(FULL, cluster=cluster, is_local=is_local, **sizes)


def make_manager(
    is_sparse: Sequence[bool | None],
    *,
    num_blocks: int = 160,
    is_local: bool = True,
    full_decode_tokens: int = 0,
    window_tokens: int = WINDOW_TOKENS,
    enable_caching: bool = True,
    takes_over: bool = True,
    report: Any = None,
    layers: Sequence[Sequence[int]] = (),
) -> KVCacheManager:
    """Make a manager as vLLM's scheduler does.

    Args:
        is_sparse: by KV cache group; None where each request's routes say.
        num_blocks: of the pool, the null block included.
        is_local: of the SPARSE groups.
        full_decode_tokens: likewise.
        window_tokens: likewise.
        enable_caching: of prefixes.
        takes_over: whether FluxCoordinator stands before vLLM's; it is `manager.flux` then.
        report: for it.
        layers: of each group; default one, of the group's own number.
    """
    register_all_kvcache_specs(None)
    register()
    specs: dict[bool | None, Any] = {
        False: FULL,
        True: sparse_spec(
            0, is_local, full_decode_tokens=full_decode_tokens, window_tokens=window_tokens
        ),
    }
    specs[None] = replace(specs[True], waits_for_routes=True)
    groups = [
        KVCacheGroupSpec([f"layers.{i}"], specs[sparse]) for i, sparse in enumerate(is_sparse)
    ]
    manager = KVCacheManager(
        KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        max_in_flight_tokens=2 * CHUNK_TOKENS,
        enable_caching=enable_caching,
    )
    if takes_over:
        layers = layers or [[i] for i in range(len(groups))]
        manager.flux = FluxCoordinator(
            manager.coordinator, layers, 2 * CHUNK_TOKENS, MAX_MODEL_LEN, report
        ).install()
        wrap_object(manager, "get_computed_blocks", manager.flux.look_up)
    return manager


class CountingReport:
    """What FluxCoordinator counts, for tests."""

    def __init__(self) -> None:
        self.freed_blocks, self.held_blocks, self.admitted_requests = 0, [], 0

    def freed(self, blocks: int) -> None:
        """Add blocks that a living request gave back."""
        self.freed_blocks += blocks

    def held(self, blocks: int) -> None:
        """Note the blocks that a request held at its end."""
        self.held_blocks.append(blocks)

    def admitted(self) -> None:
        """Count a request that others made room for."""
        self.admitted_requests += 1
