"""What `free_kv` cannot be combined with, found before the model loads."""

from collections.abc import Callable
from typing import Any

from flux_vllm.config import FluxConfig
from flux_vllm.errors import FluxConfigError, UnsupportedConfigurationError
from flux_vllm.hooks.wrap import wrap
from flux_vllm.kv.groups import cluster_layers
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.selection import uses_flux


def always_sparse_layers(
    config: FluxConfig, info: RouterInfo | None, num_layers: int
) -> tuple[int, ...]:
    """Return the layers that are SPARSE for every request."""
    if config.policy == "sparse":
        return tuple(range(num_layers))
    if config.policy == "static":
        return config.sparse_layers or ()
    return () if info is None else info.always_sparse


def check_free_kv(config: FluxConfig, info: RouterInfo | None, vllm_config: Any) -> None:
    """Check a configuration that asks for `free_kv`, and refuse later what only requests show.

    Raises: FluxConfigError, UnsupportedConfigurationError.
    """
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise UnsupportedConfigurationError(
            'flux config: expected vLLM to manage several KV cache groups with "free_kv", found '
            '--disable-hybrid-kv-cache-manager; drop it, or drop "free_kv"'
        )
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    layers = always_sparse_layers(config, info, num_layers)
    if config.policy == "router" and not (layers and config.threshold):
        raise FluxConfigError(
            'flux config: expected a router file that names layers as "always_sparse", and a '
            "threshold above 0, with \"free_kv\" and policy 'router', found "
            f"always_sparse {list(layers)} and threshold {config.threshold:g}; serve with policy "
            '"static" or "sparse", or drop "free_kv"'
        )
    cluster_layers(range(num_layers), layers)
    _refuse_sessions()


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
