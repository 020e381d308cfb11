"""Cells of `bench_never_slower.py`, and the rows that it makes of what it measured."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.turns import longer_percent

BASELINE, CONTROL = "FLASH_ATTN", "FLASH_ATTN again"


@dataclass(frozen=True, slots=True)
class Cell:
    """One comparison."""

    what: str
    """`decode_ms`: a step in which all rows decode. `ttft_ms`: one prompt to its first token.
    `mixed_ms`: one prompt to its first token beside rows that decode."""
    context: int
    """Tokens of each row's prompt."""
    batch: int = 1
    """Rows that decode."""
    prompt: int = 0
    """Of a mixed cell: tokens of the prompt."""

    @classmethod
    def read(cls, what: str, text: str) -> "Cell":
        """Read CONTEXT, CONTEXTxBATCH or CONTEXTxBATCH+PROMPT.

        Raises: ValueError: something else.
        """
        rows, _, prompt = text.partition("+")
        context, _, batch = rows.partition("x")
        return cls(what, int(context), int(batch or 1), int(prompt or 0))

    def __str__(self) -> str:
        prompt = f" + {self.prompt}" if self.prompt else ""
        return f"{self.what} {self.context} x {self.batch}{prompt}"


def decode_ideal(base: float, shortest: float, share: float) -> float:
    """Return what a step would take whose SPARSE layers cost what they do at S + W tokens."""
    return base - share * max(base - shortest, 0.0)


def rows_of(
    shape: str,
    cell: Cell,
    values: Mapping[str, Sequence[float]],
    shares: Mapping[str, float],
    ideals: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Compare each flux engine with the mean of the two baselines, turn by turn.

    Args:
        shape: name of the model's shape.
        cell: that was measured.
        values: by engine, a value a turn; baseline and control among them.
        shares: by flux engine, of SPARSE layers.
        ideals: likewise, where there is one.

    Returns: a row for each flux engine, and one for the control.
    """
    pairs = list(zip(values[BASELINE], values[CONTROL], strict=True))
    mean = [(base + control) / 2 for base, control in pairs]
    rows = []
    for name, found in values.items():
        if name == BASELINE:
            continue
        # Two engines alike differ too: the control is held against the baseline alone.
        others = values[BASELINE] if name == CONTROL else mean
        longer, interval = longer_percent(found, others)
        rows.append(
            {
                "shape": shape,
                "what": cell.what,
                "policy": name,
                "sparse_share": shares.get(name, 0.0),
                "context": cell.context,
                "batch": cell.batch,
                "prompt": cell.prompt,
                "flux": statistics.median(found),
                "flash_attn": statistics.median(others),
                "ideal": ideals.get(name),
                "longer_percent": longer,
                "interval_percent": list(interval),
                "values": list(found),
                "flash_attn_values": list(others),
            }
        )
    return rows


def describe(row: Mapping[str, Any]) -> str:
    """Write a row as a line."""
    cell = Cell(row["what"], row["context"], row["batch"], row["prompt"])
    low, high = row["interval_percent"]
    line = (
        f"{cell!s:26s} {row['policy']:16s} f={row['sparse_share']:.2f} {row['flux']:8.3f} against "
        f"{row['flash_attn']:8.3f}: {row['longer_percent']:+6.2f} % [{low:+.2f}, {high:+.2f}], "
        f"{row['flash_attn'] / row['flux']:.3f}x"
    )
    if row["ideal"] is not None:
        line += f", {row['ideal'] / row['flux']:.3f} of the ideal"
    return line
