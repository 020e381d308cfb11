"""Where vLLM learns of FluxSpec: in workers, which make specs, and in the scheduler's process."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from flux_vllm import compat
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.kv.coordinator import FluxCoordinator
from flux_vllm.kv.groups import Clusters, cluster_layers
from flux_vllm.kv.manager import FluxManager
from flux_vllm.kv.report import KVReport
from flux_vllm.kv.spec import FluxSpec
from flux_vllm.metrics.directory import metrics_directory
from flux_vllm.metrics.store import MetricStore

logger = logging.getLogger("vllm.flux")

_BLOCK_TOKENS = 64
"""Smaller blocks cost the scheduler more time than several groups need."""


def register() -> None:
    """Make FluxSpec known to vLLM in this process, and have schedulers free by it; idempotent."""
    # vLLM registers its own only where it finds none at all.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(FluxSpec, FluxManager)
    compat.wrap(Scheduler, "__init__", _start_scheduler)


def _start_scheduler(
    original: Callable,
    self: Scheduler,
    vllm_config: Any,
    kv_cache_config: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    freed = [g for g in kv_cache_config.kv_cache_groups if isinstance(g.kv_cache_spec, FluxSpec)]
    for group in freed:
        # The scheduler's own copy: clusters that are alike are looked up in one call.
        group.kv_cache_spec = replace(group.kv_cache_spec, cluster=0)
    original(self, vllm_config, kv_cache_config, *args, **kwargs)
    if freed:
        FluxCoordinator(
            self.kv_cache_manager.coordinator,
            vllm_config.max_in_flight_tokens,
            self.max_model_len,
            _report(vllm_config, kv_cache_config),
        ).install()


def _report(vllm_config: Any, kv_cache_config: Any) -> KVReport | None:
    directory = metrics_directory()
    if directory is None:
        return None
    name = vllm_config.model_config.served_model_name
    labels = {"model_name": name if isinstance(name, str) else name[0]}
    nbytes = max(
        len(group.layer_names) * group.kv_cache_spec.page_size_bytes
        for group in kv_cache_config.kv_cache_groups
    )
    return KVReport(MetricStore(directory, labels), nbytes)


def cluster_specs(
    specs: dict[str, KVCacheSpec],
    sparse_layers: tuple[int, ...] | None,
    sink_tokens: int,
    window_tokens: int,
    frees_in_prefill: bool,
) -> dict[str, KVCacheSpec]:
    """Give the layers that are SPARSE for every request a spec of their cluster.

    Args:
        specs: vLLM's, by name of the layer.
        sparse_layers: indices of those layers; None for all.
        sink_tokens: of SPARSE layers.
        window_tokens: of SPARSE layers, the query's own included.
        frees_in_prefill: whether SPARSE prefill reads no key between sinks and window.

    Returns: the specs, in the same order; layers that stay have vLLM's own.
    Raises: FluxConfigError: too few SPARSE layers.
        UnsupportedConfigurationError: layers whose KV caches differ.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    first = next(iter(specs.values()))
    if type(first) is not FullAttentionSpec or any(spec != first for spec in specs.values()):
        raise UnsupportedConfigurationError(
            'flux config: expected layers with full attention and KV caches of one shape with '
            '"free_kv", found others too (sliding windows of the model\'s own, or head counts '
            'that differ between layers); drop "free_kv"'
        )
    index_of = {name: extract_layer_index(name) for name in specs}
    layers = tuple(index_of.values())
    clusters = cluster_layers(layers, layers if sparse_layers is None else sparse_layers)
    _log(clusters, first.block_size, frees_in_prefill)
    cluster_of = {layer: i for i, cluster in enumerate(clusters.sparse) for layer in cluster}

    def spec_of(layer: int) -> KVCacheSpec:
        if layer not in cluster_of:
            return first
        return FluxSpec.of(
            first,
            cluster=cluster_of[layer],
            sink_tokens=sink_tokens,
            window_tokens=window_tokens,
            frees_in_prefill=frees_in_prefill,
        )

    register()
    return {name: spec_of(layer) for name, layer in index_of.items()}


def _log(clusters: Clusters, block_size: int, frees_in_prefill: bool) -> None:
    logger.info(
        "flux: free_kv cuts the KV cache into %d groups of %d layers and frees %d of them %s",
        clusters.num_groups,
        clusters.size,
        len(clusters.sparse),
        "as requests go" if frees_in_prefill else "once a prompt is complete",
    )
    if clusters.unfreed:
        logger.warning(
            "flux: free_kv keeps all keys of SPARSE layers %s: groups hold equally many layers, "
            "and these fill none",
            list(clusters.unfreed),
        )
    if block_size < _BLOCK_TOKENS:
        logger.warning(
            "flux: free_kv with --block-size %d costs the scheduler more than it needs to; "
            "--block-size %d is enough for %d groups",
            block_size,
            _BLOCK_TOKENS,
            clusters.num_groups,
        )
