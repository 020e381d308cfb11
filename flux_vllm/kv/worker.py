"""The worker's side of `free_kv`: layers that are always SPARSE get a spec of their own."""

import logging
from collections.abc import Callable
from typing import Any

from flux_vllm.config import FluxConfig
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.hooks.wrap import wrap_object
from flux_vllm.kv.check import always_sparse_layers
from flux_vllm.kv.groups import Clusters, cluster_layers
from flux_vllm.patterns import make_pattern
from flux_vllm.patterns.base import SparsePattern
from flux_vllm.startup.router_file import read_router_for

logger = logging.getLogger("vllm.flux")

_BLOCK_TOKENS = 64
"""With smaller blocks, several groups cost the scheduler more time than they need to."""


def cluster_kv_cache(worker: Any) -> None:
    """Split the KV cache into groups that are freed and groups that are not, if `free_kv` asks.

    Args:
        worker: vLLM's, its model loaded.

    Raises: FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError.
    """
    vllm_config = worker.vllm_config
    config = FluxConfig.from_additional_config(vllm_config.additional_config)
    if not config.free_kv:
        return
    _, info = read_router_for(config, vllm_config)
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    hook_runner(
        worker.model_runner,
        always_sparse_layers(config, info, num_layers),
        make_pattern(config.pattern_name(info), *config.window(info), config.pattern_options),
    )


def hook_runner(runner: Any, sparse_layers: tuple[int, ...], pattern: SparsePattern) -> None:
    """Have a model runner give vLLM specs by cluster from now on; only the first call counts.

    Args:
        runner: vLLM's, its model loaded.
        sparse_layers: indices of the layers that are SPARSE for every request.
        pattern: what SPARSE means.

    Raises: FluxConfigError: too few SPARSE layers.
        UnsupportedConfigurationError: layers whose KV caches differ.
    """
    if "get_kv_cache_spec" in vars(runner):
        return
    specs = runner.get_kv_cache_spec()
    clusters = cluster_layers(_indices(specs).values(), sparse_layers)
    _log(clusters, next(iter(specs.values())).block_size, pattern)

    def get_kv_cache_spec(original: Callable) -> dict[str, Any]:
        return cluster_specs(original(), clusters, pattern)

    wrap_object(runner, "get_kv_cache_spec", get_kv_cache_spec)


def cluster_specs(
    specs: dict[str, Any], clusters: Clusters, pattern: SparsePattern
) -> dict[str, Any]:
    """Give layers that are SPARSE for every request the spec of their cluster.

    Args:
        specs: vLLM's KV cache specs by name of the layer.
        clusters: of these layers.
        pattern: what SPARSE means.

    Returns: the specs in the same order; FULL layers keep vLLM's own.
    Raises: UnsupportedConfigurationError: layers whose KV caches differ.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from flux_vllm.kv.register import register
    from flux_vllm.kv.spec import FluxSpec

    first = next(iter(specs.values()))
    if type(first) is not FullAttentionSpec or any(spec != first for spec in specs.values()):
        raise UnsupportedConfigurationError(
            "flux config: expected full attention and KV caches of one shape in every layer with "
            '"free_kv", found layers that differ (in a sliding window of the model\'s own, or in '
            'their heads); drop "free_kv"'
        )
    register()
    cluster_of = {layer: i for i, cluster in enumerate(clusters.sparse) for layer in cluster}
    return {
        name: FluxSpec.of(
            first,
            cluster=cluster_of[layer],
            sink_tokens=pattern.sink_tokens,
            window_tokens=pattern.window_tokens,
            frees_in_prefill=pattern.is_local,
        )
        if layer in cluster_of
        else first
        for name, layer in _indices(specs).items()
    }


def _indices(specs: dict[str, Any]) -> dict[str, int]:
    from vllm.model_executor.models.utils import extract_layer_index

    return {name: extract_layer_index(name) for name in specs}


def _log(clusters: Clusters, block_size: int, pattern: SparsePattern) -> None:
    logger.info(
        "flux: free_kv cuts the KV cache into %d groups of %d layers; %d of them give blocks back, "
        "%s",
        clusters.num_groups,
        clusters.size,
        len(clusters.sparse),
        "as a prompt goes on" if pattern.is_local else "once a prompt is complete",
    )
    if clusters.unfreed:
        logger.warning(
            "flux: free_kv keeps all keys of the SPARSE layers %s: all groups hold equally many "
            "layers, and these fill none",
            list(clusters.unfreed),
        )
    if block_size < _BLOCK_TOKENS:
        logger.warning(
            "flux: free_kv with --block-size %d takes the scheduler more time than it needs; "
            "serve with --block-size %d",
            block_size,
            _BLOCK_TOKENS,
        )
