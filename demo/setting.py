"""How the demo serves: with the sample model's trained router, or with static routes until then."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import flux_vllm
from demo.server import DemoError
from flux_vllm.cli.sample_model import MODEL_NAME
from flux_vllm.router.checkpoint import ROUTER_FILE_NAME, read_info

__all__ = ["MODEL_NAME", "Setting"]

PACKAGED_ROUTERS = Path(flux_vllm.__file__).parent / "routers"

SINK_TOKENS = 64
WINDOW_TOKENS = 512

# Retrieval suffers most when 18, 23 or 7 is SPARSE, some when 8, 20 or 21 is (docs/DESIGN.md); the
# others were added by guess, until the demo's prompt was answered.
STATIC_FULL_LAYERS = (0, 6, 7, 8, 18, 19, 20, 21, 22, 23, 24, 25)


@dataclass(frozen=True, slots=True)
class Setting:
    """What the server is told."""

    num_layers: int
    flux: dict[str, object]
    """For `--additional-config '{"flux": ...}'`."""
    explanation: str

    @classmethod
    def choose(cls, model: Path) -> "Setting":
        """Use the router beside the model or in the package; static routes if there is none."""
        num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        for folder in (model, PACKAGED_ROUTERS / MODEL_NAME):
            if (folder / ROUTER_FILE_NAME).is_file():
                info = read_info(folder)
                return cls(
                    num_layers,
                    {"router": str(folder)},
                    f"routes by the trained router in {folder}: SPARSE is the first "
                    f"{info.sink_tokens} and the latest {info.window_tokens} tokens",
                )
        sparse = [layer for layer in range(num_layers) if layer not in STATIC_FULL_LAYERS]
        return cls(
            num_layers,
            {
                "policy": "static",
                "sparse_layers": sparse,
                "sink_tokens": SINK_TOKENS,
                "window_tokens": WINDOW_TOKENS,
            },
            f"no trained router for this model yet: policy static, the same {len(sparse)} of "
            f"{num_layers} layers SPARSE\n        for every request "
            f"(the first {SINK_TOKENS} and the latest {WINDOW_TOKENS} tokens)",
        )

    def serve_arguments(self, model: Path) -> list[str]:
        """Return the arguments of `flux-vllm serve`, host and port left to the server."""
        return [
            _short(model),
            *("--served-model-name", MODEL_NAME),
            *("--attention-backend", "flux"),
            *("--additional-config", json.dumps({"flux": self.flux})),
            *("--dtype", "bfloat16"),
            *("--max-model-len", "8192"),
            *("--max-num-batched-tokens", "2048"),
            *("--kv-cache-memory-bytes", str(2 * 2**30)),
            "--enforce-eager",
        ]

    @staticmethod
    def shell_line(arguments: Sequence[str]) -> str:
        """Write arguments as a person would type them, one option a line."""
        quoted = " ".join(shlex.quote(argument) for argument in arguments)
        return quoted.replace(" --", " \\\n      --")


def _short(path: Path) -> str:
    """Return a path relative to here, if it is below."""
    if not path.is_dir():
        raise DemoError(f"expected the sample model in {path}, found no folder there")
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
