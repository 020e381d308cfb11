"""What a SPARSE layer attends to in prefill: the interface of the sparse patterns.

Decode is the same under every pattern: sinks and window, widened to whole KV blocks (`views.py`).
A pattern is the class `Pattern` of `patterns/NAME.py`, and NAME an entry of `SPARSE_PATTERNS`;
docs/PATTERNS.md shows how to add one.

Dimension legend: R requests, Q queries of a chunk, S keys of a request, N query heads, K kv heads,
H head dim, M block-table width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from flux_vllm.batch import Batch
from flux_vllm.errors import FluxConfigError

if TYPE_CHECKING:
    from flux_vllm.attention_backend.cpu.pages import PageLayout
    from flux_vllm.attention_backend.cuda.calls import Kernels, LayerCall


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's queries in a step; their keys are in the cache already."""

    computed: int
    """Position of the first query."""
    scheduled: int
    """Queries Q."""
    prompt_len: int
    block_row: torch.Tensor
    """[M] int32: the request's row of the block table; entries past its length are stale."""
    block_size: int
    """Tokens a block."""


class CpuPrefill(Protocol):
    """One chunk, planned once a step and used by every SPARSE layer."""

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: "PageLayout",
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """Attend one layer's queries of the chunk.

        Args:
            query: [Q, N, H].
            kv_cache: [num_blocks, K, block_size, 2 * H].
            layout: of `kv_cache`.
            scale: of the scores.
            output: [Q, N, H], written.
        """


class CudaPrefill(Protocol):
    """A batch's prefill rows, planned once a step and used by every layer."""

    def attend(self, call: "LayerCall", kernels: "Kernels") -> None:
        """Attend the rows whose `sparse_seqused_q` is not 0 in this layer; leave the others.

        Host sync: none.
        """


@dataclass(frozen=True, kw_only=True)
class SparsePattern(ABC):
    """What SPARSE means. Fields that a subclass adds are the options an operator may set.

    Raises: FluxConfigError: an option out of range.
    """

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
    def visible(
        self, query: torch.Tensor, key: torch.Tensor, prompt_len: int, scale: float
    ) -> torch.Tensor:
        """Define the pattern: which keys a chunk's queries attend to. The tests' oracle, slow.

        Args:
            query: [Q, N, H]; the last one is that of the last key.
            key: [S, K, H].
            prompt_len: tokens of the request's prompt.
            scale: of the scores.

        Returns: [Q, S] bool, or [N, Q, S] where heads differ.
        """

    @abstractmethod
    def prefill_keys(self, batch: Batch) -> np.ndarray | None:
        """Sum the keys that each row's queries attend to in one SPARSE layer, for the metrics.

        Returns: [R] int64, as if all rows were prefill; None where it depends on the data.
        """

    @abstractmethod
    def cpu_prefill(self, chunk: Chunk) -> CpuPrefill:
        """Plan a SPARSE chunk on the CPU."""

    @abstractmethod
    def cuda_prefill(self, batch: Batch, device: torch.device) -> CudaPrefill:
        """Plan a batch on CUDA; rows with decode, FULL or short prefill are in it too."""

    def cuda_nbytes(self, num_heads: int, max_tokens: int, max_len: int, head_nbytes: int) -> int:
        """Return the most memory that a `CudaPrefill` holds beside the KV cache, if not little.

        Args:
            num_heads: query heads of this rank.
            max_tokens: of a step.
            max_len: tokens of the longest request.
            head_nbytes: of one head's vector.
        """
        return 0


def option_error(name: str, expected: str, found: object) -> FluxConfigError:
    """Make the error for an option out of range."""
    return FluxConfigError(
        f'flux config: expected {expected} for "{name}" in "pattern_options", found {found!r}; '
        "change it in --additional-config '{\"flux\": {...}}'"
    )


def make_pattern(
    name: str, sink_tokens: int, window_tokens: int, options: Mapping[str, Any] | None = None
) -> SparsePattern:
    """Make the pattern of a name in `SPARSE_PATTERNS`.

    Args:
        name: of the pattern, checked before.
        sink_tokens: S.
        window_tokens: W.
        options: the pattern's own fields; None or absent fields keep their defaults.

    Raises: FluxConfigError: an option that the pattern does not have, or out of range.
    """
    kind = import_module(f"flux_vllm.patterns.{name}").Pattern
    given = dict(options or {})
    common = {field.name for field in fields(SparsePattern)}
    known = [field.name for field in fields(kind) if field.name not in common]
    unknown = [option for option in given if option not in known]
    if unknown:
        raise FluxConfigError(
            f'flux config: expected "pattern_options" among {known} for sparse_pattern {name!r}, '
            f"found {unknown}; remove or correct them"
        )
    pattern: SparsePattern = kind(sink_tokens=sink_tokens, window_tokens=window_tokens, **given)
    return pattern
