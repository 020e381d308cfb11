"""The server's sparse patterns, by name: what a SPARSE layer attends to in a prompt.

`flux_vllm/attention_backend/patterns` defines them. Training imports the router alone, so their
options are named once more; the tests hold them to the server's.
"""

from dataclasses import dataclass

from flux_vllm.errors import UnsupportedConfigurationError

BLOCK = 128
"""Positions a block of `XAttention`."""


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """A query at position p attends to keys [0, S) and (p - W, p]."""

    sink_tokens: int
    window_tokens: int


@dataclass(frozen=True, kw_only=True)
class Triangle(Streaming):
    """Streaming, and every key for the prompt's last `tail_tokens` queries."""

    tail_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class XAttention(Streaming):
    """Key blocks that hold most of a query block's estimated attention."""

    threshold: float = 0.9
    stride: int = 16


_PATTERNS = {"streaming": Streaming, "triangle": Triangle, "xattention": XAttention}


def make_pattern(name: str, sink_tokens: int, window_tokens: int) -> Streaming:
    """Make a pattern with the server's default options.

    Raises: UnsupportedConfigurationError: a pattern that only the server knows.
    """
    if name not in _PATTERNS:
        raise UnsupportedConfigurationError(
            f"expected a sparse pattern among {list(_PATTERNS)}, found {name!r}; measure a router "
            "under it on the server"
        )
    return _PATTERNS[name](sink_tokens=sink_tokens, window_tokens=window_tokens)


def tail_tokens(name: str) -> int:
    """Return how many queries at a prompt's end a pattern shows everything."""
    return Triangle.tail_tokens if name == "triangle" else 0
