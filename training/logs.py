"""What a run tells while it goes on: JSON lines, a progress bar, TensorBoard on request."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]


class RunLog:
    """Writes one row a step.

    Args:
        folder: of the run; rows go to `log.jsonl` there.
        total: steps of the run.
        done: steps done before.
        enabled: False on all processes but one.
        tensorboard: also write TensorBoard events.
    """

    def __init__(
        self, folder: Path, total: int, done: int, enabled: bool, tensorboard: bool
    ) -> None:
        self._file = None
        self._writer: Any = None
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not enabled,
            file=sys.stderr,
            mininterval=1.0 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
            unit="step",
        )
        self._start = time.monotonic()
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            _truncate(folder / "log.jsonl", done)
            self._file = (folder / "log.jsonl").open("a", encoding="utf-8")
        if enabled and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def step(self, row: dict[str, Any]) -> None:
        """Log one step: `step`, `loss`, `temperature`, `shares` by task, and more."""
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        shares = " ".join(f"{name[:9]} {share:.2f}" for name, share in row["shares"].items())
        self._bar.set_postfix_str(
            f"loss {row['loss']:.3f} T {row['temperature']:.2f} sparse: {shares}", refresh=False
        )
        self._bar.update(row["step"] - self._bar.n)
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, dict):
                    self._writer.add_scalars(name, value, row["step"])
                elif name != "step":
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush and end."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _truncate(path: Path, done: int) -> None:
    """Drop rows of steps that a resumed run does again."""
    if path.is_file():
        rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
        kept = [line for line in rows if _step_of(line) <= done]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
