"""Where vLLM learns of FluxSpec: in workers, which make specs, and in the scheduler's process."""

import copyreg
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from flux_vllm.hooks.wrap import wrap
from flux_vllm.kv.coordinator import FluxCoordinator
from flux_vllm.kv.manager import FluxManager
from flux_vllm.kv.spec import FluxSpec
from flux_vllm.metrics.directory import metrics_directory
from flux_vllm.metrics.kv_report import KVReport
from flux_vllm.metrics.store import MetricStore


def register() -> None:
    """Make FluxSpec known to vLLM in this process, and have schedulers free by it; idempotent."""
    # vLLM registers its own only where it finds none at all.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(FluxSpec, FluxManager)
    copyreg.pickle(FluxSpec, _reduce)
    wrap(Scheduler, "__init__", _start_scheduler)


def _reduce(spec: FluxSpec) -> tuple[Callable, tuple[dict[str, Any]]]:
    """Pickle so that the reading process registers the spec before it has one.

    Workers send their specs to the scheduler's process, where nothing else says that flux is in
    use.
    """
    return _restore, ({field.name: getattr(spec, field.name) for field in fields(spec)},)


def _restore(values: dict[str, Any]) -> FluxSpec:
    register()
    return FluxSpec(**values)


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
