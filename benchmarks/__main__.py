"""The suite: list it, or run what this machine can.

    python -m benchmarks                        what there is
    python -m benchmarks run --out FOLDER       every benchmark for this machine, one after another
    python -m benchmarks run --only bench_plans --out FOLDER

Rows go to FOLDER/NAME.json, and what a benchmark prints to FOLDER/NAME.log. Speed is measured on a
commit whose tests are green.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.row_file import say
from benchmarks.suite import SUITE, Benchmark


def main(argv: Sequence[str] | None = None) -> int:
    """List or run. Returns: the number of benchmarks that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run = parser.add_subparsers(dest="command").add_parser("run", help="run for this machine")
    run.add_argument("--out", type=Path, required=True, help="folder for rows and logs")
    run.add_argument("--only", nargs="+", metavar="MODULE", help="of the list")
    args = parser.parse_args(argv)
    if args.command is None:
        for benchmark in SUITE:
            say(describe(benchmark))
        return 0
    chosen = choose(args.only, machine())
    args.out.mkdir(parents=True, exist_ok=True)
    return sum(_run(benchmark, args.out) for benchmark in chosen)


def describe(benchmark: Benchmark) -> str:
    """Write a line about a benchmark."""
    by_hand = "" if benchmark.arguments is not None else "  (by hand)"
    what = f"{benchmark.module:30s} {benchmark.machine}  {benchmark.minutes:3d} min"
    return f"{what}  {benchmark.makes}{by_hand}"


def machine() -> str:
    """Say what this machine can run: `gpu` or `cpu`."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def choose(only: Sequence[str] | None, machine: str) -> list[Benchmark]:
    """Pick what runs on a machine.

    Raises: ValueError: a name of which nothing runs there.
    """
    able = [b for b in SUITE if b.machine == machine and b.arguments is not None]
    names = {b.module for b in able}
    if only is not None and not names >= set(only):
        raise ValueError(
            f"--only: expected names among {sorted(names)} on a machine with a {machine}, found "
            f"{sorted(set(only) - names)}; see `python -m benchmarks`"
        )
    return [b for b in able if only is None or b.module in only]


def _run(benchmark: Benchmark, out: Path) -> bool:
    """Run one. Returns: whether it failed."""
    log = out / f"{benchmark.module}.log"
    say(f"{benchmark.module}: about {benchmark.minutes} minutes; {log}")
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *benchmark.command(out)], stdout=file, stderr=subprocess.STDOUT
        )
    say(f"{benchmark.module}: " + ("done" if done.returncode == 0 else f"failed, see {log}"))
    return done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())
