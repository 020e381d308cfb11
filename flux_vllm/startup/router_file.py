"""Where the router lies: the path given, the model's folder, or the hub's cache."""

from pathlib import Path
from typing import Any

from flux_vllm.config import FluxConfig
from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router.checkpoint import RouterInfo, read_router
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.place import ROUTER_FILE_NAME, ROUTER_PLACES, find_router, the_only


def read_router_for(
    config: FluxConfig, vllm_config: Any
) -> tuple[LayerRouter, RouterInfo] | tuple[None, None]:
    """Read the router where one is needed or given; others take sizes from one they find.

    Args:
        config: the operator's.
        vllm_config: the engine's, for the place of the model's weights.

    Returns: the router and what its file says of it; two None where there is none.
    Raises: RouterCheckpointError: it is missing, or not to be read.
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
                f"{vllm_config.model_config.revision or 'main'}), found no {ROUTER_PLACES[0]} "
                f"under {_hub_cache(vllm_config)}; nothing is downloaded for it: fetch the file "
                f"with `hf download {name} --include '*{ROUTER_FILE_NAME}'`, give its place as "
                """--additional-config '{"flux": {"router": "PATH"}}', or choose a policy that """
                'needs none ("full", "sparse", "static")'
            )
        return None, None
    path = config.router_path(name)
    if required or find_router(path):
        return read_router(path)
    return None, None


def _router_in_hub_cache(vllm_config: Any) -> Path | None:
    """Find the router in the snapshot of a model that is named by its hub id, offline."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    model = vllm_config.model_config
    try:
        found = [
            try_to_load_from_cache(model.model, place, _hub_cache(vllm_config), model.revision)
            for place in ROUTER_PLACES
        ]
    except HFValidationError:
        return None
    return the_only(Path(file) for file in found if isinstance(file, str))


def _hub_cache(vllm_config: Any) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return vllm_config.load_config.download_dir or HF_HUB_CACHE
