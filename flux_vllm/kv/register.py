"""Where vLLM learns of FluxSpec: in workers, which make specs, and in the scheduler's process."""

import copyreg
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from flux_vllm.kv.manager import FluxManager
from flux_vllm.kv.spec import FluxSpec


def register() -> None:
    """Make FluxSpec known to vLLM in this process; idempotent."""
    # vLLM registers its own only where it finds none at all.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(FluxSpec, FluxManager)
    copyreg.pickle(FluxSpec, _reduce)


def _reduce(spec: FluxSpec) -> tuple[Callable, tuple[dict[str, Any]]]:
    """Pickle so that the reading process registers the spec before it has one.

    Workers send their specs to the scheduler's process before that makes a scheduler.
    """
    return _restore, ({field.name: getattr(spec, field.name) for field in fields(spec)},)


def _restore(values: dict[str, Any]) -> FluxSpec:
    register()
    return FluxSpec(**values)
