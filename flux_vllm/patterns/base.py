"""What a SPARSE layer attends to in prefill: the interface of the sparse patterns.

Decode is the same under every pattern: sinks and window, widened to whole KV blocks. A pattern is
the class `Pattern` of `patterns/NAME.py`, and NAME an entry of `SPARSE_PATTERNS`. It says what is
attended to, in torch alone; how a device does it stands in `attention_backend/DEVICE/patterns/`.
docs/PATTERNS.md shows how to add one.

Dimension legend: R requests.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flux_vllm.batch import Batch
from flux_vllm.errors import FluxConfigError


@dataclass(frozen=True, kw_only=True)
class SparsePattern(ABC):
    """What SPARSE means. Fields that a subclass adds are the options an operator may set.

    Raises: FluxConfigError: an option out of range.
    """

    name: ClassVar[str]
    """In `SPARSE_PATTERNS`; that of the modules which define and implement it."""

    sink_tokens: int
    """First tokens attended in decode; most patterns attend to them in prefill too."""
    window_tokens: int
    """Latest tokens attended in decode, the query's own included; likewise."""

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether no SPARSE prefill query ever reads a key between sinks and window."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """Tokens of context up to which SPARSE prefill sees every key, as FULL does."""

    @abstractmethod
    def prefill_keys(self, batch: Batch) -> np.ndarray | None:
        """Sum the keys that each row's queries attend to in one SPARSE layer, for the metrics.

        Returns: [R] int64, as if all rows were prefill; None where it depends on the data.
        """


def option_error(name: str, expected: str, found: object) -> FluxConfigError:
    """Make the error for an option out of range."""
    return FluxConfigError(
        f'flux config: expected {expected} for "{name}" in "pattern_options", found {found!r}; '
        "change it in --additional-config '{\"flux\": {...}}'"
    )
