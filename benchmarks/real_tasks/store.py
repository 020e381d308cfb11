"""Results in files, one for each variant and measure: what is there is not measured again."""

import json
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance

Row = dict[str, Any]


class ResultFolder:
    """A folder `LABEL/MEASURE.json` of one model's variants.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def labels(self) -> list[str]:
        """Return the labels of all variants that have a result."""
        return sorted({file.parent.name for file in self.path.glob("*/*.json")})

    def measures(self, label: str) -> list[str]:
        """Return what was measured of a variant."""
        return sorted(file.stem for file in (self.path / label).glob("*.json"))

    def has(self, label: str, measure: str, settings: Row) -> bool:
        """Say whether a result is there.

        Raises: ValueError: one is, of other settings.
        """
        if not self._file(label, measure).exists():
            return False
        found = self.read(label, measure)["settings"]
        if found != settings:
            names = sorted(
                name
                for name in {*found, *settings}
                if found.get(name, "none") != settings.get(name, "none")
            )
            raise ValueError(
                f"{self._file(label, measure)}: expected a result of these settings, found another "
                f"{', '.join(names)}: {[found.get(name) for name in names]} against "
                f"{[settings.get(name) for name in names]}; give another --out, or delete the file"
            )
        return True

    def read(self, label: str, measure: str) -> Row:
        """Return a result: `settings`, `variant`, `provenance` and `rows`."""
        result: Row = json.loads(self._file(label, measure).read_text())
        return result

    def write(self, label: str, measure: str, settings: Row, variant: Row, rows: Any) -> None:
        """Keep a result; a file of its name is always complete."""
        file = self._file(label, measure)
        file.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "settings": settings,
            "variant": variant,
            "provenance": provenance(),
            "rows": rows,
        }
        begun = file.with_suffix(".begun")
        begun.write_text(json.dumps(result, ensure_ascii=False) + "\n")
        begun.replace(file)

    def _file(self, label: str, measure: str) -> Path:
        return self.path / label / f"{measure}.json"
