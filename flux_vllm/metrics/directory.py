"""Where workers leave their counters for the API server: one folder of small mmapped files.

The folder's name travels in the environment, which vLLM's engine and worker processes inherit. What
a killed server left is removed when the next one starts.
"""

import atexit
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.multiprocess import MultiProcessCollector

from flux_vllm.metrics.liveness import hold, remove_ended
from flux_vllm.metrics.store import remove_ended_stores

_VLLM_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_OWN_VARIABLE = "FLUX_METRICS_DIR"
FOLDER_VARIABLES = (_OWN_VARIABLE, _VLLM_VARIABLE)
"""Environment variables that name the folder to workers."""
LIVE_PLUGIN = "flux_live"
"""The name of the live page's plugin, which vLLM loads where `VLLM_PLUGINS` has it."""
_PREFIX = "flux-metrics-"
_folder: tuple[int, str] | None = None
"""What this process made, under its process id: a forked child is no owner."""


def metrics_directory() -> Path | None:
    """Return the folder in use; None where no front end prepared one (metrics are then off)."""
    name = os.environ.get(_VLLM_VARIABLE) or os.environ.get(_OWN_VARIABLE)
    return Path(name) if name else None


def live_page_is_on() -> bool:
    """Tell whether vLLM attaches the live page, the only reader of the latest requests' routes."""
    return LIVE_PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(",")


def prepare_front_end() -> None:
    """Make this process show the workers' counters, before the engine starts.

    The folder is always of this process's own making: a name in the environment is that of the
    process that started this one, and another server's counts are none of ours. Unless vLLM has one
    for its own metrics, with several API servers or by the operator's wish: its `/metrics` then
    shows nothing but the files in there, so the workers' have to be among them.
    """
    global _folder
    if shared := os.environ.get(_VLLM_VARIABLE):
        remove_ended_stores(Path(shared))
        return
    if _folder is None or _folder[0] != os.getpid() or not Path(_folder[1]).is_dir():
        _remove_ended_folders()
        _folder = (os.getpid(), _make_folder())
        atexit.register(_remove, _folder[1], os.getpid())
        REGISTRY.register(FluxCollector(_folder[1]))
    os.environ[_OWN_VARIABLE] = _folder[1]


class FluxCollector(MultiProcessCollector):
    """Sums the workers' files at each scrape, in the process that made it.

    Args:
        path: the folder of `metrics_directory`.
    """

    def __init__(self, path: str) -> None:
        super().__init__(registry=None, path=path)
        self._owner = os.getpid()

    def describe(self) -> list:
        """Announce nothing, so that registering reads no file and clashes with no name."""
        return []

    def collect(self) -> list:
        """Read the files; none once the folder is gone, at exit, and none in a forked child."""
        is_ours = self._owner == os.getpid() and Path(self._path).is_dir()
        return list(super().collect()) if is_ours else []


def _make_folder() -> str:
    """Make a folder and hold it to this process's end."""
    while True:
        name = tempfile.mkdtemp(prefix=_PREFIX)
        with suppress(FileNotFoundError):
            descriptor = os.open(name, os.O_RDONLY)
            if hold(descriptor, Path(name)):
                return name
            os.close(descriptor)


def _remove_ended_folders() -> None:
    """Remove what this user's killed front ends left."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                remove_ended(path)


def _remove(name: str, owner: int) -> None:
    if os.getpid() == owner:  # forked children inherit the exit handler
        shutil.rmtree(name, ignore_errors=True)
