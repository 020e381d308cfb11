"""What a worker says when it starts, and where it will count: the log, and the metrics' files."""

import logging
from dataclasses import astuple
from typing import Any

from flux_vllm.metrics.directory import FOLDER_VARIABLES, live_page_is_on, metrics_directory
from flux_vllm.metrics.journal import RouteJournal
from flux_vllm.metrics.reporter import RouteReporter
from flux_vllm.metrics.store import MetricStore, model_label
from flux_vllm.routing.runtime import FluxRuntime

logger = logging.getLogger("vllm.flux")


def start_reporting(runtime: FluxRuntime, vllm_config: Any, kernels: str) -> None:
    """Log what was set up, and start counting on the first tensor-parallel rank.

    Of pipeline stages the first one counts requests and what the host knows of them; each counts
    what its own kernels read. What cannot be counted is said in the log; it is no reason not to
    serve.

    Args:
        runtime: gets its reporter, and its journal where a live page reads that.
        vllm_config: the engine's.
        kernels: that serve its layers, by name.
    """
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    config, info = runtime.config, runtime.info
    pattern = f"{config.pattern_name(info)}, sink {runtime.sink_tokens} and window "
    pattern += f"{runtime.window_tokens} tokens"
    if config.sparse_prefill:
        pattern += ", all prompts SPARSE"
    if runtime.full_decode_tokens:
        pattern += f" after {runtime.full_decode_tokens} of an answer"
    logger.info(
        "flux: policy %s, %d routed layers, pattern %s, threshold %g, kernels %s",
        config.policy,
        len(runtime.routed_layers),
        pattern,
        config.threshold,
        kernels,
    )
    if get_tensor_model_parallel_rank() != 0:
        runtime.reads_back = False
        return
    directory = metrics_directory()
    if directory is None:
        logger.warning(
            "flux: expected the folder of the counters in %s or %s, which the API server's process "
            "sets, found neither in this worker; nothing is counted and the live page stays empty: "
            "hand the variable on to the workers",
            *FOLDER_VARIABLES,
        )
        return
    model, router = _labels(runtime, vllm_config, kernels)
    try:
        reporter = RouteReporter(
            MetricStore(directory, model),
            runtime.routed_layers,
            vllm_config.cache_config.block_size,
            runtime.pattern,
            counts_requests=get_pp_group().is_first_rank,
            full_decode_tokens=runtime.full_decode_tokens,
            sparse_prefill=config.sparse_prefill,
        )
        reporter.announce(**router)
        runtime.reporter = reporter
        if live_page_is_on() and get_pp_group().is_first_rank:
            num_layers = runtime.table.num_layers
            layers = {"num_layers": num_layers, "routed_layers": runtime.routed_layers}
            runtime.journal = RouteJournal(directory, model | router | layers, num_layers)
    except OSError as error:
        logger.warning(
            "flux: expected room for %s in %s, found: %s; requests are served without",
            "counters" if runtime.reporter is None else "the latest requests' routes",
            directory,
            error,
        )


def _labels(
    runtime: FluxRuntime, vllm_config: Any, kernels: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Say what serves: labels of every metric, and those of `flux_router_info` besides."""
    config, info = runtime.config, runtime.info
    router = {
        "policy": config.policy,
        "base_model": info.base_model if info else "",
        "threshold": f"{config.threshold:g}",
        "sparse_pattern": config.pattern_name(info),
        "sink_tokens": str(runtime.sink_tokens),
        "window_tokens": str(runtime.window_tokens),
        "full_decode_tokens": str(runtime.full_decode_tokens),
        "sparse_prefill": str(config.sparse_prefill).lower(),
        "probe": "+".join(map(str, astuple(info.inputs.probe))) if info else "",
        "pools": " ".join(map(str, info.inputs.pools)) if info else "",
        "kernels": kernels,
    }
    return model_label(vllm_config), router
