"""How the demo serves the sample model: with the trained router that lies beside it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from flux_vllm.cli.sample_model import SMOLLM2


def serve_arguments(model: Path) -> list[str]:
    """Return the arguments of `flux-vllm serve`, host and port left to the server."""
    here = Path.cwd()
    return [
        str(model.relative_to(here) if model.is_relative_to(here) else model),
        *("--served-model-name", SMOLLM2.name),
        *("--attention-backend", "flux"),
        *("--dtype", "bfloat16"),
        *("--max-model-len", "8192"),
        # A prompt that fits one chunk is routed by the same tokens as in training.
        *("--max-num-batched-tokens", "8192"),
        *("--kv-cache-memory-bytes", str(2 * 2**30)),
        "--enforce-eager",
    ]


def shell_line(arguments: Sequence[str]) -> str:
    """Write arguments as a person would type them, one option a line."""
    return " ".join(shlex.quote(argument) for argument in arguments).replace(" --", " \\\n      --")
