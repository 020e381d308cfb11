"""The command `flux-vllm`."""

from flux_vllm.cli.commands import main

__all__ = ["main"]
