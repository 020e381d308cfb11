"""What the commands share: an error that ends a command, and progress on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from importlib.util import find_spec

from flux_vllm.errors import (
    CheckpointImportError,
    FluxConfigError,
    RouterCheckpointError,
    UnsupportedConfigurationError,
)

FLUX_ERRORS = (
    FluxConfigError,
    RouterCheckpointError,
    CheckpointImportError,
    UnsupportedConfigurationError,
)
"""What the package raises for its user; the message is all there is to show."""

INSTALL_VLLM = (
    "install it with `make install` in a checkout of Flux-vLLM (CPU), or with "
    "`pip install 'flux-vllm[cuda]'` on a machine with an NVIDIA GPU"
)


class CommandError(Exception):
    """Ends a command with exit code 1; the message says what was found and what to do."""


class Progress:
    """Prints what a command is doing, with the seconds since it began, to stderr."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def __call__(self, text: str) -> None:
        seconds = time.monotonic() - self._begin
        print(f"[{seconds:3.0f}s] {text}", file=sys.stderr, flush=True)


def require(module: str, remedy: str) -> None:
    """Check that a module can be found, without importing it.

    Raises: CommandError: it is not installed.
    """
    if find_spec(module) is None:
        raise CommandError(
            f"expected the Python module {module!r}, found none in {sys.prefix}; {remedy}"
        )


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Keep tqdm's bars, of which libraries draw some too, out of pipes and files.

    tqdm reads TQDM_DISABLE when it is imported, and torch may have imported it long ago.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    original = tqdm.__init__
    if not sys.stderr.isatty():
        tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original
