"""Where a model's router lies: a place that is named, beside the weights, or in the hub's cache."""

from pathlib import Path
from typing import Any

from flux_vllm.config import FluxConfig
from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router.checkpoint import ROUTER_FILE_NAME, RouterInfo, read_router
from flux_vllm.router.model import LayerRouter


def find_router(
    config: FluxConfig, vllm_config: Any
) -> tuple[LayerRouter, RouterInfo] | tuple[None, None]:
    """Read the router where one is needed or given; others take sizes from one they find.

    Raises: RouterCheckpointError: there is none where one is needed, or it cannot be read.
    """
    required = config.needs_router or config.router is not None
    name = vllm_config.model_config.model
    if config.router is None and not Path(name).exists():
        cached = _router_in_hub_cache(vllm_config)
        if cached is not None:
            return read_router(cached)
        if required:
            raise RouterCheckpointError(
                f"expected a router in the cached snapshot of {name} (revision "
                f"{vllm_config.model_config.revision or 'main'}), found no {ROUTER_FILE_NAME} "
                f"under {_hub_cache(vllm_config)}; nothing is downloaded for it: fetch the file "
                f"with `hf download {name} {ROUTER_FILE_NAME}`, give its place as "
                """--additional-config '{"flux": {"router": "PATH"}}', or choose a policy that """
                'needs none ("full", "sparse", "static")'
            )
        return None, None
    path = config.router_path(name)
    if required or (path / ROUTER_FILE_NAME).is_file():
        return read_router(path)
    return None, None


def _router_in_hub_cache(vllm_config: Any) -> Path | None:
    """Find the router in the snapshot of a model that is named by its hub id, offline."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    model = vllm_config.model_config
    try:
        found = try_to_load_from_cache(
            model.model, ROUTER_FILE_NAME, _hub_cache(vllm_config), model.revision
        )
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _hub_cache(vllm_config: Any) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return vllm_config.load_config.download_dir or HF_HUB_CACHE
