"""`python -m training`: train and evaluate routers, build corpora, show prompts."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flux_vllm.errors import RouterCheckpointError, UnsupportedConfigurationError
from training import cli, recipes
from training.config import DivergenceConfig, EvalConfig, OrderConfig, TrainConfig
from training.prompts import commands as prompt_commands


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a router for a frozen model")
    train.add_argument(
        "--recipe",
        choices=sorted(recipes.RECIPES),
        default="budget",
        help="settings to begin from; flags below change them (defaults shown: budget)",
    )
    cli.add_flags(train, TrainConfig, recipes.budget())
    evaluate = commands.add_parser("eval", help="measure a router on held-out tasks")
    cli.add_flags(evaluate, EvalConfig, recipes.evaluation())
    divergence = commands.add_parser(
        "divergence",
        help="compare a router and static patterns with full attention on prompts from files",
    )
    cli.add_flags(divergence, DivergenceConfig, DivergenceConfig())
    order = commands.add_parser(
        "order", help="put into a router file in which order a server frees its layers"
    )
    cli.add_flags(order, OrderConfig, OrderConfig())
    corpus = commands.add_parser("corpus", help="collect text to build prompts from")
    corpus.add_argument("--out", type=Path, required=True, help=".jsonl, .jsonl.xz or .jsonl.gz")
    corpus.add_argument("--limit_mib", type=float, default=8.0, help="text from each folder, MiB")
    corpus.add_argument(
        "folders", type=Path, nargs="*", help="default: Python's library, licences, Perl's manual"
    )
    prompts = commands.add_parser("prompts", help="write held-out prompts as JSON lines")
    cli.add_flags(prompts, EvalConfig, recipes.evaluation())
    _add_join(commands)
    _add_throughput(commands)
    prompt_commands.add(commands)
    return parser


def _add_join(commands: Any) -> None:
    join = commands.add_parser("join", help="join the quality.json files of several seeds")
    join.add_argument("files", type=Path, nargs="+", help="quality.json of each seed")
    join.add_argument(
        "--out", type=Path, required=True, help="JSON file; the seeds' curves go beside it as .png"
    )
    join.add_argument(
        "--beside",
        action="extend",
        type=_named_file,
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="further reports, as eval and join write them, put under NAME into the joined one",
    )


def _add_throughput(commands: Any) -> None:
    throughput = commands.add_parser(
        "throughput", help="measure training speed and peak memory against prompt length"
    )
    throughput.add_argument("--model", required=True, help="folder or name of the language model")
    throughput.add_argument("--out", type=Path, required=True, help="JSON file for the rows")
    throughput.add_argument(
        "--recipe",
        choices=sorted(recipes.RECIPES),
        default="budget",
        help="whose router sizes, dtype and kernels are measured (default: budget)",
    )
    throughput.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096, 8192, 16384, 32768],
        help="tokens of a prompt (default: powers of two from 1024 to 32768)",
    )
    throughput.add_argument(
        "--tokens",
        type=int,
        default=32768,
        help="tokens computed at once: as many prompts as fit, one at least (default: 32768)",
    )
    throughput.add_argument("--steps", type=int, default=5, help="timed steps (default: 5)")
    throughput.add_argument(
        "--compile_layers",
        choices=("true", "false"),
        help="compile the model's norms and MLPs or not (default: as the recipe says)",
    )


def _named_file(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, found {text!r}")
    return name, Path(file)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns: the exit status.
    """
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except (ValueError, RouterCheckpointError, UnsupportedConfigurationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command in prompt_commands.NAMES:
        prompt_commands.run(arguments)
    elif arguments.command == "train":
        from training.trainer import train

        config = cli.apply_flags(recipes.RECIPES[arguments.recipe](), arguments)
        print(train(_require(config, "model", "out")))
    elif arguments.command == "eval":
        from training.evaluation.evaluate import evaluate

        settings = cli.apply_flags(recipes.evaluation(), arguments)
        evaluate(_require(settings, "model", "router", "out"))
    elif arguments.command == "divergence":
        from training.evaluation.divergence import compare

        compared = cli.apply_flags(DivergenceConfig(), arguments)
        report = compare(_require(compared, "model", "router", "out"))
        print(json.dumps(report["rows"], indent=1))
    elif arguments.command == "order":
        from training.freeing import add_order

        ordered = cli.apply_flags(OrderConfig(), arguments)
        path, order = add_order(_require(ordered, "model", "router", "out"))
        print(f"{path}: {list(order)}")
    elif arguments.command == "prompts":
        from training.evaluation.prompts import write_prompts

        settings = cli.apply_flags(recipes.evaluation(), arguments)
        write_prompts(_require(settings, "model", "out"))
    elif arguments.command == "corpus":
        from training.data.text import collect, default_sources, write_corpus

        documents = collect(arguments.folders or default_sources(), arguments.limit_mib)
        write_corpus(arguments.out, documents)
        print(f"{len(documents)} documents in {arguments.out}")
    elif arguments.command == "throughput":
        from training.throughput import measure

        given = {name: value for name, value in vars(arguments).items() if name != "command"}
        given["lengths"] = tuple(arguments.lengths)
        if arguments.compile_layers is not None:
            given["compile_layers"] = arguments.compile_layers == "true"
        measure(**given)
    else:
        from training.evaluation.report import join_runs, plot_seeds, put_beside, write_json

        joined = put_beside(join_runs(arguments.files), arguments.beside)
        write_json(arguments.out, joined)
        plot_seeds(arguments.out.with_suffix(".png"), joined)


def _require(config: cli.Config, *names: str) -> cli.Config:
    missing = [f"--{name}" for name in names if not getattr(config, name)]
    if missing:
        raise ValueError(f"expected {' and '.join(missing)}, found nothing; give them")
    return config


if __name__ == "__main__":
    sys.exit(main())
