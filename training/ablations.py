"""Ablations of a recipe: it and one change each, trained side by side on one GPU, then evaluated.

Each training takes the same seconds, and each router answers the same held-out prompts; full
attention's scores are computed once. A session that is cut goes on where it stopped when it is
started again with the same arguments: trainings from their checkpoints, evaluations from stored
scores. On another machine, unpack what came back (`*.tar.gz`) in the folder first.
"""

import os
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from training import recipes
from training.config import TrainConfig
from training.data.families import FAMILIES

BASE = "base"
"""The recipe as it is, which the others are compared with."""
LEFT_OUT = {"without_multi_key": "multi_key", "without_list_end": "list_end"}
"""Variants whose training never sees one task family, which evaluation asks all the same."""
PASSES = {
    "default": ("--shares",),
    "validated": (
        *("--shares", "0.75", "--validation_prompts", "20", "--random_patterns", "0"),
        *("--thresholds", "0.1", "0.2", "0.3", "0.5", "0.7", "0.8", "0.9", "0.97"),
    ),
}
"""Evaluations in the order of what must not be missed, and their flags: at the default threshold;
at the threshold that validation chooses where three of four layers are SPARSE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationConfig:
    """One set of ablations."""

    model: str = ""
    """Folder or name of the language model."""
    out: str = ""
    """Folder for routers, logs, figures, `ablations.json` and `ablations.md`."""
    corpus: str = ""
    """Text to build prompts from (`python -m training corpus`); empty: found on this machine."""
    recipe: str = "smollm2"
    """Recipe that the variants change."""
    only: tuple[str, ...] = ()
    """Variants to run; empty: all."""
    train_seconds: float = 400.0
    """Time of each training without start-up, seconds; those side by side share the GPU."""
    side_by_side: int = 6
    """Commands that run at once; each takes about 10 GiB of the GPU."""
    micro_batch_tokens: int = 16384
    """Tokens that each computes at once, padding included."""
    prompts: int = 100
    """Held-out prompts a task and length."""
    budget_s: float = 0.0
    """Time after which what runs is ended and what is there is packed, seconds; 0: no limit."""
    train_flags: str = ""
    """Further flags of every training, in one string."""
    eval_flags: str = ""
    """Further flags of every evaluation, in one string."""
    dry_run: bool = False
    """Print the commands alone."""

    def __post_init__(self) -> None:
        if self.recipe not in recipes.RECIPES:
            raise ValueError(
                f"expected a recipe among {sorted(recipes.RECIPES)}, found {self.recipe!r}; "
                "correct --recipe"
            )
        unknown = sorted(set(self.only) - changes(recipes.RECIPES[self.recipe]()).keys())
        if unknown:
            raise ValueError(
                f"expected variants among {[*changes(recipes.RECIPES[self.recipe]())]}, found "
                f"{unknown}; correct --only"
            )
        if self.side_by_side < 1:
            raise ValueError(
                f"expected at least one command at a time, found {self.side_by_side}; correct "
                "--side_by_side"
            )


def changes(base: TrainConfig) -> dict[str, tuple[str, ...]]:
    """Return the flags of `python -m training train` that make each variant of a recipe."""
    tasks = base.data.tasks
    weights = ["8" if FAMILIES[task].group == "local" else "1" for task in tasks]
    found = {
        BASE: (),
        # How far two runs of the same recipe differ, which no other difference means less than.
        "seed_1": ("--seed", "1"),
        "distillation": ("--loss.distillation_weight", "1", "--loss.lm_weight", "0"),
        "unbalanced": ("--data.weights", *weights),
        "both_ends": ("--router.pool_prefix", "true"),
        "no_spread_penalty": ("--loss.spread_penalty", "0"),
        "no_recent_steps": ("--loss.recent_steps", "0"),
    }
    for pool_tokens in (32, 64, 96):
        found[f"pool_{pool_tokens}"] = ("--router.pool_tokens", str(pool_tokens))
    for name, family in LEFT_OUT.items():
        found[name] = ("--data.tasks", *(task for task in tasks if task != family))
    return found


class Session:
    """Runs what is not done yet.

    Args:
        config: of the ablations.
    """

    def __init__(self, config: AblationConfig) -> None:
        self.config = config
        self.folder = Path(config.out).resolve()
        self.changes = changes(recipes.RECIPES[config.recipe]())
        self.names = [name for name in self.changes if not config.only or name in config.only]
        self.deadline = time.monotonic() + (config.budget_s or float("inf"))
        self.failed: list[str] = []
        self.unfinished: list[str] = []
        self._lock = Lock()

    def run(self) -> None:
        """Train, evaluate, tabulate.

        Raises:
            ChildProcessError: a command failed; the others are done all the same.
            TimeoutError: the time was up before all was done.
        """
        self._each("train", self.names)
        for kind in PASSES:
            ready = [name for name in self.names if self._is_done("train", name)]
            ready = self.names if self.config.dry_run else ready
            # The first computes the scores that all share.
            self._each(kind, ready[:1])
            self._each(kind, ready[1:])
        if self.failed:
            raise ChildProcessError(
                f"expected all commands to succeed, found {', '.join(self.failed)} failing; see "
                f"{self.folder}/NAME/*.log, and start it again with the same arguments to go on"
            )
        if self.unfinished:
            raise TimeoutError(
                f"expected all to be done within {self.config.budget_s:g} s, found "
                f"{', '.join(self.unfinished)} not done; start it again with the same arguments "
                "to go on"
            )

    def _each(self, kind: str, names: Sequence[str]) -> None:
        """Do one kind of command for several variants, side by side."""
        with ThreadPoolExecutor(1 if self.config.dry_run else self.config.side_by_side) as pool:
            list(pool.map(lambda name: self._do(kind, name), names))

    def _do(self, kind: str, name: str) -> None:
        """Run one command to its end, or to the session's."""
        if self._is_done(kind, name):
            return
        arguments = self._train(name) if kind == "train" else self._eval(kind, name)
        if self.config.dry_run:
            sys.stdout.write(shlex.join(arguments) + "\n")
            return
        left = self.deadline - time.monotonic()
        if left <= 0:
            self.unfinished.append(f"{kind} {name}")
            return
        began = time.monotonic()
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        with (self.folder / name / f"{kind}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[1],
                env=os.environ | {"OMP_NUM_THREADS": "2"},
            )
            try:
                status = process.wait(None if left == float("inf") else left)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                self.unfinished.append(f"{kind} {name}")
                return
        sys.stderr.write(f"{kind} {name}: {time.monotonic() - began:.0f} s, status {status}\n")
        if status:
            self.failed.append(f"{kind} {name}")
            return
        self._done(kind, name).touch()
        with self._lock:
            self._pack(name)
            if kind != "train":
                self._tabulate()

    def _done(self, kind: str, name: str) -> Path:
        return self.folder / name / f"{kind}.done"

    def _is_done(self, kind: str, name: str) -> bool:
        return self._done(kind, name).exists()

    def _train(self, name: str) -> list[str]:
        config = self.config
        return [
            *("-m", "training", "train", "--recipe", config.recipe, *self._sources()),
            *("--out", str(self.folder / name), "--data.workers", "2"),
            *("--optimizer.micro_batch_tokens", str(config.micro_batch_tokens)),
            *("--optimizer.time_limit_s", str(config.train_seconds), "--system.save_every", "10"),
            *shlex.split(config.train_flags),
            *self.changes[name],
        ]

    def _eval(self, kind: str, name: str) -> list[str]:
        config, folder = self.config, self.folder
        return [
            *("-m", "training", "eval", *self._sources(), "--router", str(folder / name)),
            *("--out", str(folder / name / kind), "--scores", str(folder / "stored_scores")),
            *("--data.workers", "4", "--prompts", str(config.prompts)),
            *("--micro_batch_tokens", str(2 * config.micro_batch_tokens), "--variants"),
            *PASSES[kind],
            *shlex.split(config.eval_flags),
        ]

    def _sources(self) -> list[str]:
        model, corpus = Path(self.config.model), self.config.corpus
        flags = ["--model", str(model.resolve()) if model.exists() else self.config.model]
        return [*flags, "--data.corpus", str(Path(corpus).resolve())] if corpus else flags

    def _pack(self, name: str) -> None:
        """Put what is worth bringing back into one file a variant, and one for stored scores."""
        run = [path for path in (self.folder / name).iterdir() if path.name != "checkpoints"]
        write_archive(self.folder / f"{name}.tar.gz", run)
        # Evaluations beside this one may be writing; what has its last name is whole.
        scores = [*(self.folder / "stored_scores").glob("*.npz")]
        if scores:
            write_archive(self.folder / "stored_scores.tar.gz", scores)

    def _tabulate(self) -> None:
        """Write the figures of all evaluations that are there."""
        # Brings transformers, which a dry run and --help do without.
        from training.evaluation.ablation_table import tabulate

        evaluated = {
            kind: {
                name: self.folder / name / kind
                for name in self.changes
                if self._is_done(kind, name)
            }
            for kind in PASSES
        }
        tabulate(self.folder, evaluated, self.changes, BASE, LEFT_OUT)


def write_archive(path: Path, members: Sequence[Path]) -> None:
    """Write files and folders into a .tar.gz in one atomic step, named from its own folder on.

    Args:
        path: of the archive.
        members: below the archive's folder.
    """
    temporary = path.with_suffix(".writing")
    with tarfile.open(temporary, "w:gz") as archive:
        for member in members:
            archive.add(member, member.relative_to(path.parent))
    temporary.replace(path)


def run_ablations(config: AblationConfig) -> None:
    """Run a session, and say on standard output where its results are."""
    Session(config).run()
    sys.stdout.write(f"done: {config.out}\n")
