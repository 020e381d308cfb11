"""The latest routed requests of each worker, in files that the API server reads.

One file a worker: a description of its router as JSON, then a ring of records of one size. Nothing
blocks either side: a record carries a checksum, so that a reader passes over one that is being
written. A worker holds a lock on its file as long as it lives and the kernel frees it however the
worker ends, so a file without a lock is the past and never taken for the present.
"""

import fcntl
import json
import mmap
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flux_vllm.metrics.liveness import remove_ended

CAPACITY = 4096
"""Requests kept a worker; 2.4 MB with 80 layers."""
REQUEST_ID_BYTES = 160
"""A longer id, which only a client's own can be, is not kept."""

_PREFIX, _SUFFIX = "flux-routes-", ".ring"
_HEADER_ALIGNMENT = 64
_CHECKSUM_BYTES = 4


def record_dtype(num_layers: int) -> np.dtype:
    """Lay out one record; L = num_layers."""
    return np.dtype(
        [
            ("checksum", "<u4"),  # CRC-32 of all that follows
            ("prompt_tokens", "<u4"),
            ("number", "<u8"),  # 1 for the worker's first request; 0: the record is empty
            ("time", "<f8"),  # seconds since 1970
            ("request_id", f"S{REQUEST_ID_BYTES}"),  # UTF-8
            ("full_probability", "<f4", (num_layers,)),
            ("routes", "i1", (num_layers,)),
        ]
    )


class RouteJournal:
    """The file of one worker, written by it alone.

    Args:
        directory: shared with the API server.
        about: what to say of the worker's router and configuration; JSON values.
        num_layers: layers of the model.
        capacity: records in the ring.

    Raises: OSError: the folder has no room for the file.
    """

    def __init__(
        self,
        directory: Path,
        about: Mapping[str, object],
        num_layers: int,
        capacity: int = CAPACITY,
    ) -> None:
        # Nobody else clears a fixed folder of the files of workers that ended.
        for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
            remove_ended(path)
        self._record = np.zeros((), record_dtype(num_layers))
        self._capacity = capacity
        self._number = 0
        header = _header(about, num_layers, capacity)
        self._start = len(header)
        descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=".new", dir=directory)
        self._file = os.fdopen(descriptor, "w+b")  # open, hence locked, as long as we live
        fcntl.flock(self._file, fcntl.LOCK_EX)
        size = self._start + capacity * self._record.itemsize
        # Taken now: a full disk met later, in a mapped page, would kill the worker.
        os.posix_fallocate(descriptor, 0, size)
        self._map = mmap.mmap(descriptor, size)
        self._map[: self._start] = header
        Path(name).rename(Path(name).with_suffix(_SUFFIX))  # complete and locked: readers may see

    def append(
        self,
        request_id: str,
        prompt_tokens: int,
        routes: np.ndarray,
        full_probability: np.ndarray,
    ) -> None:
        """Record the routes that a request just got; L layers of the model.

        Args:
            request_id: the engine's.
            prompt_tokens: its prompt's length.
            routes: [L] int8 of `Route` values.
            full_probability: [L] float32, P(FULL); NaN where no router decided.
        """
        self._number += 1
        name = request_id.encode()
        record = self._record
        record["prompt_tokens"] = prompt_tokens
        record["number"] = self._number
        record["time"] = time.time()
        record["request_id"] = name if len(name) <= REQUEST_ID_BYTES else b""
        record["full_probability"] = full_probability
        record["routes"] = routes
        body = record.tobytes()[_CHECKSUM_BYTES:]
        data = zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little") + body
        begin = self._start + (self._number - 1) % self._capacity * len(data)
        self._map[begin : begin + len(data)] = data


@dataclass(frozen=True, slots=True)
class WorkerRoutes:
    """What one worker's file says."""

    name: str
    """Tells workers apart."""
    is_live: bool
    about: dict[str, Any]
    records: np.ndarray
    """[N] of `record_dtype`, newest first; none of a worker that ended."""


def read_journals(
    directory: Path, limit: int, is_wanted: Callable[[bytes], bool] | None = None
) -> list[WorkerRoutes]:
    """Read the latest records of every worker.

    Args:
        directory: shared with the workers.
        limit: most records to look at of each.
        is_wanted: of a request id (UTF-8), whether to read its record; None reads all.

    Returns: list of WorkerRoutes, by name.
    """
    found = []
    for path in sorted(directory.glob(f"{_PREFIX}*{_SUFFIX}")):
        with suppress(FileNotFoundError), path.open("rb") as file:  # removed since it was listed
            found.append(_read(path.stem.removeprefix(_PREFIX), file, limit, is_wanted))
    return found


def _read(
    name: str, file: BinaryIO, limit: int, is_wanted: Callable[[bytes], bool] | None
) -> WorkerRoutes:
    is_live = _is_locked(file)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        length = int.from_bytes(data[:4], "little")
        header = json.loads(data[4 : 4 + length])
        dtype = record_dtype(header["num_layers"])
        records = np.empty(0, dtype)
        if is_live:
            ring = np.frombuffer(data, dtype, header["capacity"], _padded(4 + length))
            records = _latest(ring, limit, is_wanted)
            del ring  # the map cannot be closed under it
    return WorkerRoutes(name, is_live, header["about"], records)


def _latest(ring: np.ndarray, limit: int, is_wanted: Callable[[bytes], bool] | None) -> np.ndarray:
    numbers = ring["number"].copy()
    rows = np.argsort(numbers)[::-1][: min(limit, np.count_nonzero(numbers))]
    if is_wanted is not None:
        rows = rows[[is_wanted(name) for name in ring["request_id"][rows].tolist()]]
    records = ring[rows]
    return records[_are_whole(records)]


def _are_whole(records: np.ndarray) -> list[bool]:
    # A view of their bytes: each record by itself would be copied, a millisecond for 256 of them.
    data, size = memoryview(records.tobytes()), records.itemsize
    return [
        zlib.crc32(data[at * size + _CHECKSUM_BYTES : (at + 1) * size]) == checksum
        for at, checksum in enumerate(records["checksum"].tolist())
    ]


def _is_locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _header(about: Mapping[str, object], num_layers: int, capacity: int) -> bytes:
    values = {"about": dict(about), "num_layers": num_layers, "capacity": capacity}
    text = json.dumps(values).encode()
    header = len(text).to_bytes(4, "little") + text
    return header.ljust(_padded(len(header)), b"\0")


def _padded(length: int) -> int:
    return -(-length // _HEADER_ALIGNMENT) * _HEADER_ALIGNMENT
