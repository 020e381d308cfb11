"""Where workers leave their counters for the API server: one folder of small mmapped files.

The folder's name travels in the environment, which vLLM's engine and worker processes inherit.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.multiprocess import MultiProcessCollector

_VLLM_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_OWN_VARIABLE = "FLUX_METRICS_DIR"
_collecting: set[str] = set()


def metrics_directory() -> Path | None:
    """Return the folder in use; None where no front end prepared one (metrics are then off)."""
    name = os.environ.get(_VLLM_VARIABLE) or os.environ.get(_OWN_VARIABLE)
    return Path(name) if name else None


def prepare_front_end() -> None:
    """Make this process show the workers' counters, before the engine starts.

    With several API servers vLLM shares a folder among its processes already; the workers' files
    then go there and vLLM's own collector reads them.
    """
    if os.environ.get(_VLLM_VARIABLE):
        return
    name = os.environ.get(_OWN_VARIABLE)
    if not name or not Path(name).is_dir():
        name = tempfile.mkdtemp(prefix="flux-metrics-")
        os.environ[_OWN_VARIABLE] = name
        atexit.register(_remove, name, os.getpid())
    if name not in _collecting:
        _collecting.add(name)
        REGISTRY.register(FluxCollector(name))


class FluxCollector(MultiProcessCollector):
    """Sums the workers' files at each scrape.

    Args:
        path: the folder of `metrics_directory`.
    """

    def __init__(self, path: str) -> None:
        super().__init__(registry=None, path=path)

    def describe(self) -> list:
        """Announce nothing, so that registering reads no file and clashes with no name."""
        return []

    def collect(self) -> list:
        """Read the files; none once the folder is gone, at exit."""
        return list(super().collect()) if Path(self._path).is_dir() else []


def _remove(name: str, owner: int) -> None:
    if os.getpid() == owner:  # forked children inherit the exit handler
        shutil.rmtree(name, ignore_errors=True)
