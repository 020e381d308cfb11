"""Hooks of every process that loads plugins: the choice of our backend, and the check before it."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.hooks.wrap import find, wrap
from flux_vllm.selection import is_flux, uses_flux

logger = logging.getLogger("vllm.flux")


def install() -> None:
    """Let the platform choose our backend, and check an engine's configuration before it starts.

    Raises: UnsupportedConfigurationError: vLLM lacks a function that is to be wrapped; none is.
    """
    from vllm import plugins
    from vllm.platforms.cpu import CpuPlatform

    hooks: list[tuple[Any, str, Callable, bool]] = [
        (CpuPlatform, "get_attn_backend_cls", _choose_on_cpu, True),
        (plugins, "load_general_plugins", _hook_again, False),
    ]
    module = sys.modules.get("vllm.engine.arg_utils")
    if module is not None:  # not yet, where a program loads the plugins first of all
        arguments = getattr(module, "EngineArgs", module)
        hooks.append((arguments, "create_engine_config", _check_engine_config, False))
    for owner, name, _, _ in hooks:
        find(owner, name)  # all of them, before the first is wrapped
    for hook in hooks:
        wrap(*hook)


def _hook_again(original: Callable) -> None:
    """EngineArgs asks for the plugins before it makes a configuration, loaded or not."""
    original()
    try:
        install()
    except UnsupportedConfigurationError as error:
        # In every process with plugins, also those that never ask for flux.
        logger.warning("flux: configurations are not checked before the engine starts: %s", error)


def _choose_on_cpu(
    original: Callable,
    selected_backend: Any,
    attn_selector_config: Any,
    *args: Any,
    **kwargs: Any,
) -> str:
    """vLLM's CPU platform knows its own backends only and passes over any other."""
    if not is_flux(selected_backend):
        return original(selected_backend, attn_selector_config, *args, **kwargs)
    if attn_selector_config.use_mla or attn_selector_config.use_sparse:
        raise UnsupportedConfigurationError(
            "--attention-backend flux: expected a model with ordinary attention over keys and "
            "values, found multi-head latent or sparse attention (MLA); serve it without "
            "--attention-backend flux"
        )
    return selected_backend.get_path()


def _check_engine_config(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse what flux cannot serve before anything is loaded; then await the workers' counters."""
    vllm_config = original(self, *args, **kwargs)
    if uses_flux(vllm_config):
        from flux_vllm.metrics.directory import prepare_front_end
        from flux_vllm.startup.check import check_configuration
        from flux_vllm.startup.drafter import choose_drafter_backend

        choose_drafter_backend(vllm_config)
        check_configuration(vllm_config)
        prepare_front_end()
    return vllm_config
