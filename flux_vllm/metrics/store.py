"""The worker's side of the metrics: counters in files that the API server reads.

The files are prometheus_client's own multi-process format, so its collector does the reading and
summing; a worker killed in mid-step leaves what it had counted. A worker holds its files as long as
it lives, so that the next server can tell a former one's.
"""

import itertools
import os
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.utils import floatToGoString

from flux_vllm.metrics.liveness import hold, remove_ended

_stores = itertools.count()
"""Numbers the stores of a process: two engines in one must not share a file."""


class MetricStore:
    """Counters, histograms and constant gauges of one worker process.

    Args:
        directory: shared with the API server.
        labels: on every metric.
    """

    def __init__(self, directory: Path, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        # vLLM's process may keep files of its own here under its bare process id.
        tag = f"flux-{os.getpid()}-{next(_stores)}.db"
        paths = [directory / f"{kind}_{tag}" for kind in ("counter", "histogram", "gauge_max")]
        self._held = [_open_held(path) for path in paths]
        self._counters, self._histograms, self._gauges = (MmapedDict(str(path)) for path in paths)
        self._values: dict[str, float] = {}
        self._keys: dict[tuple, str] = {}
        """By name, sample and labels: making a key costs ten times what writing a value does."""

    def add(self, name: str, amount: float, documentation: str, **labels: str) -> None:
        """Raise the counter `name` (without `_total`) by a non-negative amount."""
        key = self._key(name, f"{name}_total", labels, documentation)
        self._increase(self._counters, key, amount)

    def observe(
        self, name: str, value: float, buckets: tuple[float, ...], documentation: str
    ) -> None:
        """Add one observation to the histogram `name`; `buckets` are upper bounds, ascending."""
        edges = (*buckets, float("inf"))
        hit = bisect_left(edges, value)
        is_first = (name, f"{name}_sum") not in self._keys
        for index, edge in enumerate(edges):
            if index == hit or is_first:
                labels = {"le": floatToGoString(edge)}
                key = self._key(name, f"{name}_bucket", labels, documentation)
                self._increase(self._histograms, key, index == hit)
        self._increase(self._histograms, self._key(name, f"{name}_sum", {}, documentation), value)

    def set(self, name: str, value: float, documentation: str, **labels: str) -> None:
        """Set the gauge `name`."""
        key = self._key(name, name, labels, documentation)
        self._gauges.write_value(key, value, time.time())

    def _key(self, name: str, sample: str, labels: Mapping[str, str], documentation: str) -> str:
        kept = (name, sample, *labels.items())
        if kept not in self._keys:
            merged = {**self._labels, **labels}
            self._keys[kept] = mmap_key(
                name, sample, list(merged), list(merged.values()), documentation
            )
        return self._keys[kept]

    def _increase(self, file: MmapedDict, key: str, amount: float) -> None:
        value = self._values.get(key)
        if value is None:
            value = file.read_value(key)[0]
        self._values[key] = value = value + amount
        file.write_value(key, value, time.time())


def model_label(vllm_config: Any) -> dict[str, str]:
    """Name the served model as vLLM's own metrics do: by the first of its names."""
    name = vllm_config.model_config.served_model_name
    return {"model_name": name if isinstance(name, str) else name[0]}


def remove_ended_stores(directory: Path) -> None:
    """Remove the counts of workers that ended.

    Args:
        directory: shared with the API server, and outliving it.

    Raises: PermissionError: this user may not remove them.
    """
    for path in directory.glob("*_flux-*-*.db"):
        remove_ended(path)


def _open_held(path: Path) -> BinaryIO:
    while True:
        file = path.open("ab")
        if hold(file.fileno(), path):
            return file
        file.close()
