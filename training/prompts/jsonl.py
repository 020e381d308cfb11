"""JSON lines: written as a whole at once, appended to, and read past a cut last line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, by way of a new file that then takes the old one's place.

    Returns: number of rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    count = 0
    with fresh.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    fresh.replace(path)
    return count


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read rows.

    Raises: ValueError: a line is not a JSON object.
    """
    for _, row in read_numbered_lines(path):
        yield row


def read_numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read rows, each with the number of its line, from 1.

    Raises: ValueError: a line is not a JSON object.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object, found {line[:60].rstrip()!r}; "
                    "write the file again"
                )
            yield number, row


def drop_cut_line(path: Path) -> None:
    """Remove a last line that a killed run left without its end."""
    if path.is_file():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            path.write_bytes(whole)
