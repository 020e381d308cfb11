"""`flux-vllm import`: a published Flux-Attention checkpoint as a folder that vLLM serves."""

import argparse
import signal
from pathlib import Path
from typing import Any

from flux_vllm.cli.console import Progress, require


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `flux-vllm`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "import",
        help="make a served folder from a published Flux-Attention checkpoint",
        description="Reads the folder of a published checkpoint (PawLlamaForCausalLM, "
        "PawQwen3ForCausalLM) and writes a standard Llama or Qwen3 folder with the checkpoint's "
        "own weights and its router as flux_router.safetensors. Prints what it kept, dropped and "
        "assumed, and writes that to flux_import.json. What it does not know it refuses, and then "
        "writes nothing.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("out", type=Path, help="folder to make; new or empty")
    return parser


def run(args: argparse.Namespace) -> int:
    """Import, and print the report."""
    require("torch", "weights are copied with it; run `make install`")
    from flux_vllm.importer.model import import_checkpoint

    # An end asked for is an interruption: what was begun is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = import_checkpoint(args.checkpoint, args.out, Progress())
    print(report.render())
    print(f"\n{report.checkpoint} is in {args.out}. Serve it with:")
    print(f"  flux-vllm serve {args.out} --attention-backend flux")
    return 0
