"""Rows of a benchmark in a JSON file, written anew after each: a run cut short keeps them.

Every benchmark writes this one format: a list of objects, each with the run's `provenance`.
"""

import json
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance


class RowFile:
    """A JSON list of objects, each with the run's provenance.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[Hashable, dict[str, Any]] = {}
        self._provenance = provenance()

    def keep(self, key: Hashable, row: dict[str, Any], line: str) -> None:
        """Add a row, or replace the one of the same key, and print a line about it."""
        self._rows[key] = row | {"provenance": self._provenance}
        self._write()
        say(line)

    def keep_all(self, rows: Sequence[dict[str, Any]]) -> None:
        """Hold just these rows, of which lines were printed before."""
        self._rows = {
            number: row | {"provenance": self._provenance} for number, row in enumerate(rows)
        }
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(list(self._rows.values()), indent=1) + "\n")


def say(line: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def time_limit(seconds: float | None) -> Callable[[], bool]:
    """Return what tells whether so many seconds from now have not passed yet; None for ever."""
    begin = time.monotonic()
    return lambda: seconds is None or time.monotonic() - begin < seconds
