"""`flux-vllm routes`: which layers a prompt is routed to FULL or SPARSE."""

import argparse
import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_vllm.cli.console import FLUX_ERRORS, INSTALL_VLLM, CommandError, Progress, require
from flux_vllm.cli.route_map import (
    count_sparse,
    describe_share,
    legend,
    render_layers,
    render_strips,
    symbols_for,
)

if TYPE_CHECKING:
    from flux_vllm.routing.runtime import RouteDecision

_ROUTE_NAMES = {1: "FULL", 0: "SPARSE", -1: None}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `flux-vllm`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "routes",
        help="which layers a prompt is routed to FULL or SPARSE, as a map",
        description="Runs one prompt through the model with flux in this process (no server) and "
        "shows each layer's route and the router's P(FULL).",
    )
    parser.add_argument("model", help="folder (or hub name) of the model")
    parser.add_argument(
        "--prompt-file", required=True, metavar="FILE", help="text of the prompt; - reads stdin"
    )
    parser.add_argument(
        "--router", help="router file or folder; default: flux_router.safetensors beside the model"
    )
    parser.add_argument(
        "--policy",
        choices=("router", "full", "sparse", "static"),
        help="what chooses the routes (default: router)",
    )
    parser.add_argument(
        "--sparse-layers", metavar="LIST", help="for --policy static: for example 0,1,5,9"
    )
    parser.add_argument(
        "--threshold", type=float, help="FULL where P(FULL) is at least this (default: 0.5)"
    )
    parser.add_argument("--sink-tokens", type=int, help="first tokens a SPARSE layer attends to")
    parser.add_argument("--window-tokens", type=int, help="latest tokens a SPARSE layer attends to")
    parser.add_argument(
        "--chat", action="store_true", help="put the text into the model's chat template first"
    )
    parser.add_argument(
        "--kv-cache-gib",
        type=float,
        default=4.0,
        help="memory for the KV cache, which bounds the prompt's length (default: 4)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the map")
    parser.add_argument("--verbose", action="store_true", help="show vLLM's own log, on stderr")
    return parser


def run(args: argparse.Namespace) -> int:
    """Route the prompt and print the routes."""
    prompt = read_prompt(args.prompt_file)
    config = flux_config(args)
    require("vllm", INSTALL_VLLM)
    # stdout is for the result; vLLM would log there.
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    # One prompt needs no engine process of its own.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if not args.verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        warnings.simplefilter("ignore")
    decision = route_prompt(args, prompt, config)
    if args.json:
        print(json.dumps(as_json(args.model, decision), indent=2))
    else:
        print(render(decision))
    return 0


def read_prompt(file: str) -> str:
    """Read the prompt's text from a file, or from stdin for `-`.

    Raises: CommandError: unreadable or empty.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"expected a text file in UTF-8 at {file}, found: {error}; give another --prompt-file"
        ) from error
    if not text.strip():
        raise CommandError(
            f"expected a prompt in {file}, found no text; write the prompt into that file"
        )
    return text


def flux_config(args: argparse.Namespace) -> dict[str, object]:
    """Put the options into the keys of `--additional-config '{"flux": {...}}'`."""
    config: dict[str, object] = {
        name: getattr(args, name)
        for name in ("router", "policy", "threshold", "sink_tokens", "window_tokens")
        if getattr(args, name) is not None
    }
    if args.sparse_layers is not None:
        try:
            config["sparse_layers"] = [int(layer) for layer in args.sparse_layers.split(",")]
        except ValueError as error:
            raise CommandError(
                f"expected --sparse-layers as whole numbers with commas, like 0,1,5, found "
                f"{args.sparse_layers!r}"
            ) from error
    return config


def route_prompt(
    args: argparse.Namespace, prompt: str, config: dict[str, object]
) -> "RouteDecision":
    """Run the prompt through vLLM's offline engine and fetch its routes.

    Raises: CommandError: no engine starts, the prompt does not fit, or no decision is told.
    """
    progress = Progress()
    progress("loading vLLM")
    import vllm
    from vllm.exceptions import VLLMError

    from flux_vllm.routing.runtime import recent_decisions

    progress(f"loading {args.model}")
    try:
        llm = vllm.LLM(
            model=args.model,
            attention_backend="flux",
            additional_config={"flux": config},
            enforce_eager=True,
            disable_log_stats=True,
            use_tqdm_on_load=args.verbose,
            max_model_len=-1,  # as much as fits that memory
            kv_cache_memory_bytes=int(args.kv_cache_gib * 2**30),
        )
    except FLUX_ERRORS:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(
            f"vLLM cannot load {args.model}: {error}; run again with --verbose for its whole log"
        ) from error
    check_length(llm, prompt)
    progress("routing the prompt")
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0)
    try:
        if args.chat:
            llm.chat([{"role": "user", "content": prompt}], sampling, use_tqdm=False)
        else:
            llm.generate([prompt], sampling, use_tqdm=False)
    except (VLLMError, ValueError) as error:  # a chat template that is missing or makes it too long
        raise CommandError(
            f"vLLM cannot take the prompt: {error}; change the prompt, or leave out --chat"
        ) from error
    decisions = recent_decisions(llm)
    if not decisions:
        raise CommandError(
            "expected a prompt that is longer than sinks and window together, found one to which "
            "both routes are alike, so that none was decided; give a longer prompt"
        )
    progress("done")
    return decisions[-1]


def check_length(llm: Any, prompt: str) -> None:
    """Check that the prompt's text and one token after it fit the model and the KV cache.

    Raises: CommandError: they do not.
    """
    found, most = len(llm.get_tokenizer().encode(prompt)), llm.model_config.max_model_len - 1
    if found > most:
        raise CommandError(
            f"expected a prompt of at most {most:,} tokens, which the model and the KV cache hold, "
            f"found {found:,}; shorten it, or give a larger --kv-cache-gib if the model takes more"
        )


def as_json(model: str, decision: "RouteDecision") -> dict[str, object]:
    """Put a decision into an object for JSON: P(FULL) is null where no router was asked."""
    sparse, routed = count_sparse(decision.routes)
    return {
        "model": model,
        "prompt_tokens": decision.prompt_tokens,
        "sparse_layers": sparse,
        "routed_layers": routed,
        "layers": [
            {
                "layer": layer,
                "route": _ROUTE_NAMES[route],
                "full_probability": None if math.isnan(probability) else round(probability, 6),
            }
            for layer, (route, probability) in enumerate(
                zip(decision.routes, decision.full_probability, strict=True)
            )
        ],
    }


def render(decision: "RouteDecision") -> str:
    """Draw a decision as text."""
    symbols = symbols_for(sys.stdout)
    asked = not all(math.isnan(probability) for probability in decision.full_probability)
    return "\n".join(
        [
            f"{decision.prompt_tokens:,} prompt tokens: {describe_share(decision.routes)}",
            "",
            render_strips([("route", decision.routes)], symbols, shares=False),
            "",
            legend(symbols) + (", with the router's P(FULL)" if asked else ""),
            render_layers(decision.routes, decision.full_probability, symbols),
        ]
    )
