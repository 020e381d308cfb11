"""The worker's side of `free_kv`: layers that can be SPARSE get a spec of their cluster."""

import logging
from collections.abc import Callable
from typing import Any

from flux_vllm.config import FluxConfig
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.hooks.wrap import wrap_object
from flux_vllm.kv.check import SCHEDULERS, choose_clusters
from flux_vllm.kv.groups import Clusters
from flux_vllm.patterns import make_pattern
from flux_vllm.patterns.base import SparsePattern
from flux_vllm.startup.layers import attention_layers, layers_for_router
from flux_vllm.startup.router_file import read_router_for

logger = logging.getLogger("vllm.flux")

_BLOCK_TOKENS = 64
"""With smaller blocks, several groups cost the scheduler more time than they need to."""


def cluster_kv_cache(worker: Any) -> None:
    """Split the KV cache into groups that can be freed and groups that cannot, for `free_kv`.

    Args:
        worker: vLLM's, its model loaded.

    Raises: FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError.
    """
    vllm_config = worker.vllm_config
    config = FluxConfig.from_additional_config(vllm_config.additional_config)
    runner = worker.model_runner
    if not config.free_kv or "get_kv_cache_spec" in vars(runner):
        return
    found = vllm_config.scheduler_config.scheduler_cls
    if found not in SCHEDULERS:
        raise UnsupportedConfigurationError(
            'flux config: expected a configuration that vLLM\'s EngineArgs made with "free_kv", '
            f"where flux chooses the scheduler, found scheduler_cls {found!r}; make it so, or set "
            f"scheduler_cls to one of {list(SCHEDULERS)}"
        )
    _, info = read_router_for(config, vllm_config)
    layers = set(_indices(runner.get_kv_cache_spec()).values())
    unrouted = layers - _routed(runner.get_model()) if config.needs_router else set()
    clusters = choose_clusters(config, info, layers, unrouted)
    if clusters.routed and clusters.size > 1 and not (info is not None and info.freeing_order):
        logger.warning(
            "flux: expected a router file that says in which order layers are freed, found none; "
            "clusters follow the layers' own order, and fewer of them are SPARSE as a whole: put "
            "the order into the file with `python -m training order`"
        )
    hook_runner(
        runner,
        clusters,
        make_pattern(config.pattern_name(info), *config.window(info), config.pattern_options),
        config.full_decode(info),
    )
    _warn_of_short_requests(runner, vllm_config.model_config.max_model_len)


def hook_runner(
    runner: Any, clusters: Clusters, pattern: SparsePattern, full_decode_tokens: int = 0
) -> None:
    """Have a model runner give vLLM specs by cluster from now on.

    Args:
        runner: vLLM's, its model loaded.
        clusters: of its layers.
        pattern: what SPARSE means.
        full_decode_tokens: of an answer, for which SPARSE layers attend to everything.
    """
    specs = runner.get_kv_cache_spec()
    _log(clusters, next(iter(specs.values())).block_size, pattern, full_decode_tokens)

    def get_kv_cache_spec(original: Callable) -> dict[str, Any]:
        return cluster_specs(original(), clusters, pattern, full_decode_tokens)

    wrap_object(runner, "get_kv_cache_spec", get_kv_cache_spec)


def cluster_specs(
    specs: dict[str, Any],
    clusters: Clusters,
    pattern: SparsePattern,
    full_decode_tokens: int = 0,
) -> dict[str, Any]:
    """Give layers that can be freed the spec of their cluster.

    Args:
        specs: vLLM's KV cache specs by name of the layer.
        clusters: of these layers.
        pattern: what SPARSE means.
        full_decode_tokens: of an answer, for which SPARSE layers attend to everything.

    Returns: the specs in the same order; the other layers keep vLLM's own.
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
    static = len(clusters.sparse) - clusters.routed
    return {
        name: FluxSpec.of(
            first,
            cluster=cluster_of[layer],
            sink_tokens=pattern.sink_tokens,
            window_tokens=pattern.window_tokens,
            is_local=pattern.is_local,
            full_decode_tokens=full_decode_tokens,
            waits_for_routes=cluster_of[layer] >= static,
        )
        if layer in cluster_of
        else first
        for name, layer in _indices(specs).items()
    }


def _warn_of_short_requests(runner: Any, max_model_len: int) -> None:
    """Say so where even the longest request keeps all its keys."""
    from flux_vllm.kv.spec import FluxSpec

    spec = next(s for s in runner.get_kv_cache_spec().values() if isinstance(s, FluxSpec))
    processed = max_model_len - 2  # as the longest request's last step begins
    if spec.freed_end(processed) <= spec.sink_blocks or processed < spec.whole_until(1, 1):
        logger.warning(
            "flux: free_kv gives nothing back: expected requests to outgrow sinks and window (%d "
            "and %d tokens) by some blocks, and answers full_decode_tokens (%d), found "
            "max_model_len %d; serve longer requests, shorten window_tokens or full_decode_tokens, "
            "or drop it",
            spec.sink_tokens,
            spec.window_tokens,
            spec.full_decode_tokens,
            max_model_len,
        )


def _indices(specs: dict[str, Any]) -> dict[str, int]:
    from vllm.model_executor.models.utils import extract_layer_index

    return {name: extract_layer_index(name) for name in specs}


def _routed(model: Any) -> set[int]:
    return {layer.index for layer in layers_for_router(model, attention_layers(model))}


def _log(
    clusters: Clusters, block_size: int, pattern: SparsePattern, full_decode_tokens: int
) -> None:
    begin = "as a prompt goes on" if pattern.is_local else "once a prompt is complete"
    if full_decode_tokens:
        begin = f"once an answer has {full_decode_tokens} tokens"
    logger.info(
        "flux: free_kv cuts the KV cache into %d groups of %d layers; %d of them give blocks back, "
        "%d of these only where a request routes all their layers SPARSE, %s",
        clusters.num_groups,
        clusters.size,
        len(clusters.sparse) - clusters.kept,
        clusters.routed - clusters.kept,
        begin,
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
