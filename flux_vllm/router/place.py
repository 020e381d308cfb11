"""Where a router's file lies: alone, or beside a model's weights."""

from collections.abc import Iterable
from pathlib import Path

from flux_vllm.errors import RouterCheckpointError

ROUTER_FILE_NAME = "flux_router.safetensors"
ROUTER_PLACES = (f"flux/{ROUTER_FILE_NAME}", ROUTER_FILE_NAME)
"""Within a model's folder. The first is where it belongs: loaders that list a folder themselves
take every safetensors file in it for weights. The second is read too."""


def beside_weights(model: Path) -> Path:
    """Give the place for a router in a model's folder."""
    return model / ROUTER_PLACES[0]


def find_router(folder: Path) -> Path | None:
    """Find the router in a folder: a model's, or one that holds nothing but routers.

    Raises: RouterCheckpointError: there are two.
    """
    return the_only(file for place in ROUTER_PLACES if (file := folder / place).is_file())


def the_only(found: Iterable[Path]) -> Path | None:
    """Give the one router of those found in a model's places, or None.

    Raises: RouterCheckpointError: there are two.
    """
    files = list(found)
    if len(files) > 1:
        raise RouterCheckpointError(
            f"expected one router beside the weights, found {files[0]} and {files[1]}; remove the "
            "one that is not meant, or name the one that is as "
            """--additional-config '{"flux": {"router": "PATH"}}'"""
        )
    return files[0] if files else None


def locate_router(path: Path) -> Path:
    """Resolve a router file, or a folder that holds one.

    Raises: RouterCheckpointError: there is none, or there are two.
    """
    expected = beside_weights(path) if path.is_dir() else path
    file = find_router(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise RouterCheckpointError(
            f"expected a router at {expected}, found nothing there; train one with "
            "`python -m training train`, or give its place as "
            """--additional-config '{"flux": {"router": "PATH"}}', or choose a policy that """
            'needs none ("full", "sparse", "static")'
        )
    return file
