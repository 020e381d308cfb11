"""The sparse patterns, a file each; `flux_vllm.patterns.base` is their interface."""

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from flux_vllm.errors import FluxConfigError
from flux_vllm.patterns.base import SparsePattern


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
