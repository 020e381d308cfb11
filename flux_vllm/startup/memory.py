"""The share of the KV cache's memory that our buffers take."""

import logging
from typing import Any

from flux_vllm.routing.runtime import FluxRuntime

logger = logging.getLogger("vllm.flux")


def reserve_buffers(available_bytes: int, worker: Any, runtime: FluxRuntime) -> int:
    """Take what our buffers need out of the memory that the KV cache may use.

    Args:
        available_bytes: what vLLM found for the KV cache.
        worker: vLLM's worker, its model loaded.
        runtime: its runtime.

    Returns: bytes left for the KV cache.
    """
    if worker.device.type == "cpu":
        return available_bytes
    from flux_vllm.attention_backend.cuda.memory import fixed_nbytes

    nbytes = fixed_nbytes(runtime, worker.vllm_config, _kv_cache_groups(worker))
    logger.info("flux: views and workspaces take %.1f MiB of the KV cache's memory", nbytes / 2**20)
    return available_bytes - nbytes


def _kv_cache_groups(worker: Any) -> list[Any]:
    """Say how vLLM will group the attention layers in its KV cache (KVCacheGroupSpec)."""
    from vllm.v1.kv_cache_interface import AttentionSpec, UniformTypeKVCacheSpecs
    from vllm.v1.worker.utils import add_kv_sharing_layers_to_kv_cache_groups

    def has_attention(spec: Any) -> bool:
        # Where heads differ, a drafter's from the model's, a group's spec holds one of each layer.
        if isinstance(spec, UniformTypeKVCacheSpecs):
            return has_attention(spec.first_spec)
        return isinstance(spec, AttentionSpec)

    config = worker.vllm_config
    groups = _all_groups(config, dict(worker.get_kv_cache_spec()))
    layers = config.compilation_config.static_forward_context
    owners = {n: getattr(x, "kv_sharing_target_layer_name", None) for n, x in layers.items()}
    add_kv_sharing_layers_to_kv_cache_groups({n: o for n, o in owners.items() if o}, groups)
    return [group for group in groups if has_attention(group.kv_cache_spec)]


def _all_groups(vllm_config: Any, specs: dict[str, Any]) -> list[Any]:
    try:
        from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder
    except ImportError:  # vLLM 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

        return get_kv_cache_groups(vllm_config, specs)
    return get_kv_cache_config_builder(vllm_config).get_kv_cache_groups(vllm_config, specs)
