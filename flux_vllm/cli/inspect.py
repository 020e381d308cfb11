"""`flux-vllm inspect`: what a router file is, and whether it fits a model."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_vllm.cli.console import CommandError, require
from flux_vllm.cli.route_map import render_bar, symbols_for

if TYPE_CHECKING:
    from flux_vllm.router.checkpoint import RouterInfo
    from flux_vllm.router.model import LayerRouter


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `flux-vllm`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="what a router file is, and whether it fits a model",
        description="Reads a router file, checks every tensor in it, and prints for which model "
        "and how it was made. With --model it also checks that the router fits that model; exit "
        "code 1 says that the file is broken or does not fit.",
    )
    parser.add_argument(
        "router", type=Path, help="a router file, or a folder (a model's too) that holds one"
    )
    parser.add_argument(
        "--model", help="folder (or hub name) of the model that the router should fit"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print what the file is; check it against the model if one is given."""
    require("torch", "a router is read with it; run `make install`")
    from flux_vllm.router.checkpoint import read_router
    from flux_vllm.router.place import locate_router

    path = locate_router(args.router)
    router, info = read_router(path)
    print(describe(path, router, info))
    print()
    print(describe_leanings(router))
    if args.model is not None:
        layers, head_dims = model_shape(args.model)
        head_dim = info.head_dim if info.head_dim in head_dims else min(head_dims)
        check_fits(path, info, args.model, layers, head_dim)
        print(f"\nFits {args.model}: {layers} layers, head_dim {head_dim}.")
    return 0


def describe(path: Path, router: "LayerRouter", info: "RouterInfo") -> str:
    """Describe a router file in a few lines: `name  value`."""
    parameters = sum(parameter.numel() for parameter in router.parameters())
    probe, pools = info.inputs.probe, ", ".join(map(str, info.inputs.pools))
    widths = [outputs for outputs, _ in router.shapes.values()][:-1]
    ends = f"first {probe.head_tokens} and last {probe.tail_tokens}"
    sparse = f"the first {info.sink_tokens} and the latest {info.window_tokens} tokens"
    if info.full_decode_tokens:
        sparse = f"everything for an answer's first {info.full_decode_tokens} tokens, then {sparse}"
    rows = [
        ("file", f"{path} ({path.stat().st_size / 1e6:.1f} MB)"),
        ("base model", info.base_model or "not said"),
        ("layers", f"{info.num_layers}, head_dim {info.head_dim}"),
        ("parameters", f"{parameters:,} ({parameters // info.num_layers:,} a layer)"),
        ("widths", f"{router.num_inputs} inputs, then {', '.join(map(str, widths))}"),
        ("looks at", f"{pools} of the prompt's {ends} tokens"),
        ("in layers", ", ".join(["its own", *map(str, info.context_layers)])),
        ("SPARSE means", f"{info.sparse_pattern} in prompts, {sparse} in decode"),
    ]
    rows += [(f"  {name}", str(value)) for name, value in info.provenance.items()] or [
        ("provenance", "none in the file")
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def describe_leanings(router: "LayerRouter") -> str:
    """Show, layer by layer, the route that the output bias alone would choose."""
    _, bias = router.linear("head.4")
    probabilities = bias.detach().float().softmax(dim=-1)[:, 1].tolist()
    symbols = symbols_for(sys.stdout)
    lines = ["leaning of each layer: P(FULL) that its output bias alone would give"]
    cells = [
        f"{layer:>3} {probability:4.2f} {render_bar(probability, symbols)}"
        for layer, probability in enumerate(probabilities)
    ]
    height = -(-len(cells) // 4)
    lines += ["   ".join(cells[row::height]).rstrip() for row in range(height)]
    return "\n".join(lines)


def model_shape(model: str) -> tuple[int, set[int]]:
    """Read a model's number of layers, and its head_dims, from its configuration.

    Raises: CommandError: there is no readable configuration.
    """
    require("transformers", "the model's configuration is read with it; run `make install`")
    from transformers import AutoConfig

    if not (Path(model) / "config.json").is_file() and Path(model).exists():
        raise CommandError(
            f"expected a model folder with config.json at {model}, found none; give the folder of "
            "the model's weights"
        )
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"expected a model with a readable config.json at {model}, found: {error}"
        ) from error
    text = config.get_text_config()
    layers = text.num_hidden_layers
    try:
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    except RuntimeError:  # transformers tells no one size where layers differ (Gemma 4)
        return layers, {text.per_layer_config[layer].head_dim for layer in range(layers)}
    return layers, {head_dim}


def check_fits(path: Path, info: "RouterInfo", model: str, layers: int, head_dim: int) -> None:
    """Check that a router has a model's number of layers and head_dim.

    Raises: CommandError: it does not.
    """
    for what, found, expected in (
        ("layers", info.num_layers, layers),
        ("head_dim", info.head_dim, head_dim),
    ):
        if found != expected:
            raise CommandError(
                f"{path} does not fit {model}: expected {what} {expected} as the model has, found "
                f"{found} (the router was made for {info.base_model or 'an unnamed model'}); use "
                "the router of this model, or train one with `python -m training train`"
            )
