"""What `free_kv` cannot be combined with, found before the model loads."""

from collections.abc import Callable, Iterable
from typing import Any

from flux_vllm.config import FluxConfig
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.hooks.wrap import wrap
from flux_vllm.kv.groups import Clusters, cluster_by_route, cluster_layers
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.selection import uses_flux

SCHEDULERS = ("flux_vllm.kv.scheduler.FluxScheduler", "flux_vllm.kv.scheduler.AsyncFluxScheduler")
"""For synchronous and for asynchronous scheduling."""


def choose_clusters(
    config: FluxConfig,
    info: RouterInfo | None,
    layers: Iterable[int],
    unrouted: Iterable[int] = (),
) -> Clusters:
    """Cut a model's layers into KV cache groups, by what its policy says of them.

    Args:
        config: the operator's.
        info: the router file's; None where there is none.
        layers: indices of all layers with a KV cache.
        unrouted: of them, those for which no router decides; a loaded model has them.

    Raises: FluxConfigError: too few layers that are SPARSE for every request, under a policy that
        has the same routes for all.
    """
    layers = set(layers)
    if config.policy == "sparse":
        return cluster_layers(layers, layers)
    if config.policy == "static":
        return cluster_layers(layers, layers.intersection(config.sparse_layers or ()))
    assert info is not None, "policy `router` has one"
    order = [i for i in info.freeing_order or range(info.num_layers) if i in layers]
    return cluster_by_route(order, info.always_sparse, unrouted)


def check_free_kv(config: FluxConfig, info: RouterInfo | None, vllm_config: Any) -> None:
    """Check a configuration that asks for `free_kv`, and have vLLM schedule by it.

    Raises: FluxConfigError, UnsupportedConfigurationError.
    """
    _check_features(vllm_config)
    choose_clusters(config, info, range(vllm_config.model_config.get_total_num_hidden_layers()))
    _choose_scheduler(vllm_config.scheduler_config)
    _refuse_sessions()


def _check_features(vllm_config: Any) -> None:
    """Refuse what else decides about blocks, or needs them all."""
    speculative = vllm_config.speculative_config
    drafts = speculative is not None and speculative.method != "ngram"
    for expected, found, remedy in (
        (  # first: vLLM manages but one group beside most connectors
            "KV blocks that stay on their device",
            vllm_config.kv_transfer_config is not None
            and "a KV connector or offloading, which moves blocks that were given back",
            "switch it off",
        ),
        (
            "vLLM to manage several KV cache groups",
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
            and "--disable-hybrid-kv-cache-manager",
            "drop it",
        ),
        (
            "one pipeline stage",
            vllm_config.parallel_config.pipeline_parallel_size > 1
            and "several, whose layers form KV cache groups of their own",
            "serve by tensor parallel",
        ),
        (
            "speculative decoding by ngram",
            drafts and f"{speculative.method}, whose drafter's keys no route gives back",
            "choose ngram",
        ),
    ):
        if found:
            raise UnsupportedConfigurationError(
                f'flux config: expected {expected} with "free_kv", found {found}; {remedy}, or '
                'drop "free_kv"'
            )


def _choose_scheduler(scheduler_config: Any) -> None:
    if scheduler_config.scheduler_cls not in (None, *SCHEDULERS):
        raise UnsupportedConfigurationError(
            'flux config: expected vLLM\'s own scheduler with "free_kv", which flux extends, found '
            f'--scheduler-cls {scheduler_config.scheduler_cls}; drop it, or drop "free_kv"'
        )
    scheduler_config.scheduler_cls = SCHEDULERS[bool(scheduler_config.async_scheduling)]


def _refuse_sessions() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(InputProcessor, "process_inputs", _process_inputs)


def _process_inputs(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A session's prompt grows once keys are freed that the new part may read."""
    if kwargs.get("resumable") and uses_flux(self.vllm_config):
        config = FluxConfig.from_additional_config(self.vllm_config.additional_config)
        if config.free_kv:
            raise UnsupportedConfigurationError(
                'flux config: expected requests whose prompt is complete with "free_kv", found '
                'one with streaming input; send it whole, or serve without "free_kv"'
            )
    return original(self, *args, **kwargs)
