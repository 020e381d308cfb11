r"""Routers of several seeds, from a writer's asks to judged ones, on one GPU.

    python -m training texts --out texts.jsonl.xz
    python -m training requests --texts texts.jsonl.xz --out asks.jsonl --count 3600 --seed 1
    python -m benchmarks.experiments.router_seeds --model MODEL --eval EVAL_FOLDER \
        --texts texts.jsonl.xz --asks asks.jsonl --out RUN

One engine answers the asks and the prompts that are made of them. Costs are measured with nothing
beside: that takes the GPU's memory. Then vLLM's own backend, the seeds' routers and the static
patterns that the fit names answer the real tasks, side by side, and the first seed's server and
vLLM's are timed, one after the other. What is in RUN is not done again.
`python -m benchmarks.real_tasks join RUN/tasks --out FILE` gives rows.
"""

import argparse
import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.real_tasks.variants import BASELINES
from benchmarks.row_file import say
from training.data.prompt_files import read_prompt_files
from training.prompts.answerer import AnswerSettings
from training.prompts.answers import make_answerer, write_answers

_PYTHON = sys.executable
_TASKS = ("longbench", "needles", "gsm8k_list", "prompts")
_TIMED_KV_GIB, _KV_GIB = 15, 4
"""Of servers that are timed with 16 prompts of 31,000 tokens, and of others."""
_ANSWER_TOKENS = 128
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Study:
    """What is made, and how long measuring may take."""

    model: Path
    eval: Path
    texts: Path
    asks: Path
    needles: Path | None
    out: Path
    count: int
    """Prompts to make."""
    most_tokens: int
    """Of a prompt."""
    kv_gib: float
    """Of the engine that answers."""
    measure_seconds: float
    measured_full_tokens: int
    """`full_decode_tokens` under which costs are measured."""
    full_decode_tokens: int
    """Those under which routers are judged."""
    budget_share: float
    seeds: tuple[int, ...]
    thresholds: tuple[float, ...]
    baseline: str = "flash_attn"
    """vLLM's own backend, as `real_tasks` calls it."""
    answering: tuple[str, ...] = ()
    """Further arguments of every `real_tasks answer`."""

    def router(self, seed: int) -> Path:
        """Return the folder of a seed's router."""
        return self.out / f"seed-{seed}"

    @property
    def answers(self) -> Path:
        """Prompts with the model's answers."""
        return self.out / "answers.jsonl"

    @property
    def held_out(self) -> Path:
        """Those of the prompts that no router is fitted to, for agreement."""
        return self.out / "held_out.jsonl"

    def train(self, seed: int) -> list[str]:
        """Give the command that measures costs and fits to them; later seeds only fit."""
        is_first = seed == self.seeds[0]
        return [
            *(_PYTHON, "-m", "training", "train", "--model", str(self.model)),
            *("--data.files", str(self.answers), "--data.max_tokens", str(self.most_tokens)),
            *("--data.max_answer_tokens", str(_ANSWER_TOKENS), "--seed", str(seed)),
            *("--router.full_decode_tokens", str(self.measured_full_tokens)),
            *("--loss.budget_share", str(self.budget_share), "--loss.budget_nats", "1"),
            *("--optimizer.time_limit_s", str(self.measure_seconds)),
            *("--costs.prompts", "0" if is_first else "-1", "--out", str(self.router(seed))),
        ]

    def answer(self, variants: Sequence[str], is_timed: bool, seed: int = 0) -> list[str]:
        """Give the command of one server that answers the real tasks."""
        command = [
            *(_PYTHON, "-m", "benchmarks.real_tasks", "answer", "--model", str(self.model)),
            *("--eval", str(self.eval), "--out", str(self.out / "tasks"), "--seed", str(seed)),
            *("--prompts", str(self.held_out), "--teacher-seconds", "1200"),
            *("--kv-gib", str(_TIMED_KV_GIB if is_timed else _KV_GIB)),
            *("--tasks", *_TASKS, *(["speed"] if is_timed else [])),
        ]
        if self.needles:
            command += ["--needle-file", str(self.needles)]
        if is_timed:
            command += ["--speed-lock", str(self.out / "speed.lock")]
        flux: dict[str, Any] = {"full_decode_tokens": self.full_decode_tokens}
        if any("static:" in variant for variant in variants):
            flux["router"] = str(self.router(self.seeds[0]))
        if variants != [self.baseline]:
            command += ["--flux", json.dumps(flux)]
        command += [part for variant in variants for part in ("--variant", variant)]
        return [*command, "--baseline-label", self.baseline, *self.answering]

    def judged(self) -> list[list[str]]:
        """Give the servers of routers and static patterns; the first one is timed."""
        first, *others = self.seeds
        most = ",".join(map(str, self.thresholds))
        name = f"seed{first}=router:{self.router(first)}"
        commands = [self.answer([f"{name}@{self.thresholds[0]}"], True, first)]
        if len(self.thresholds) > 1:
            rest = ",".join(map(str, self.thresholds[1:]))
            commands.append(self.answer([f"{name}@{rest}"], False, first))
        for seed in others:
            variant = f"seed{seed}=router:{self.router(seed)}@{most}"
            commands.append(self.answer([variant], False, seed))
        fit = json.loads((self.router(first) / "fit.json").read_text())
        patterns = [
            f"static{count}=static:{','.join(map(str, layers))}"
            for count, layers in fit["static_layers"].items()
        ]
        return [*commands, self.answer([*patterns[1:3], "sparse"], False)]


def main() -> None:
    """Do what is not done yet."""
    study = _parse()
    study.out.mkdir(parents=True, exist_ok=True)
    # In a process of its own: with it ends the engine.
    _wait_for(get_context("spawn").Process(target=_make_prompts, args=(study,)))
    first = study.router(study.seeds[0])
    for seed in study.seeds:
        folder = study.router(seed)
        folder.mkdir(exist_ok=True)
        if folder != first and not (folder / "measurements").exists():
            (folder / "measurements").symlink_to(first / "measurements")
        if not (folder / "fit.json").is_file():
            _wait([_start(study, f"train-{seed}", study.train(seed))])
    with (study.out / "speed.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        baseline = _start(study, study.baseline, study.answer([study.baseline], True))
        timed, *rest = (
            _start(study, f"judged-{number}", command)
            for number, command in enumerate(study.judged())
        )
        _wait(rest, beside=(baseline, timed))
    _wait([baseline, timed])  # each is timed while it holds the lock


def _make_prompts(study: Study) -> None:
    """Let one engine write, and answer what is made of that."""
    if study.held_out.is_file():
        return
    written, prompts = study.out / "written.jsonl", study.out / "prompts.jsonl"
    common: dict[str, Any] = {"model": str(study.model), "kv_gib": study.kv_gib, "batch": 8192}
    asks = AnswerSettings(prompts=study.asks, out=written, temperature=0.7, **common)
    command = [
        *(_PYTHON, "-m", "training", "requests", "--texts", str(study.texts)),
        *("--written", str(written), "--model", str(study.model), "--out", str(prompts)),
        *("--count", str(study.count), "--max_tokens", str(study.most_tokens)),
        *("--seed", "1", "--check", str(study.eval)),
    ]
    with closing(make_answerer(asks)) as answerer:
        write_answers(asks, answerer)
        if not prompts.is_file():
            subprocess.run(command, check=True)
        write_answers(AnswerSettings(prompts=prompts, out=study.answers, **common), answerer)
    study.held_out.write_text("".join(held_out(study.answers)))


def held_out(answers: Path) -> Iterable[str]:
    """Give the prompts of the test split as lines, without their answers."""
    kept = ("id", "messages", "prompt", "kind", "max_new_tokens")
    with answers.open() as lines:
        for line, prompt in zip(lines, read_prompt_files([answers]), strict=True):
            row = json.loads(line)
            if prompt.split == "test":
                fields = {name: row[name] for name in kept if row.get(name)}
                yield json.dumps(fields, ensure_ascii=False) + "\n"


def _wait_for(process: Any) -> None:
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"expected prompts and answers, found exit code {process.exitcode}")


def _start(study: Study, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    log = study.out / f"{name}.log"
    say(f"{name}: its log is {log}")
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, close_fds=True)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], beside: Sequence[subprocess.Popen[bytes]] = ()
) -> None:
    """Wait for some. If one of these or of others fails, all are ended: they need each other."""
    watched = [*processes, *beside]
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in watched):
            break
        time.sleep(_POLL_SECONDS)
    failed = [process.args for process in watched if process.poll()]
    if failed:
        for process in watched:
            process.terminate()
        raise RuntimeError(f"expected these to end well, found their logs' last lines: {failed}")


def _parse() -> Study:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--eval", type=Path, required=True, help="folder of the real tasks")
    add("--texts", type=Path, required=True, help="of `training texts`")
    add("--asks", type=Path, required=True, help="of `training requests`")
    add("--needles", type=Path, help="of `benchmarks.real_tasks needles`; default: made anew")
    add("--out", type=Path, required=True)
    add("--count", type=int, default=1700, help="prompts to make (default 1700)")
    add("--most-tokens", type=int, default=20_000, help="of a prompt (default 20000)")
    add("--kv-gib", type=float, default=40, help="of the engine that answers (default 40)")
    add("--measure-seconds", type=float, default=480, help="for costs (default 480)")
    add("--measured-full-tokens", type=int, default=0, help="full_decode_tokens while measuring")
    add("--full-decode-tokens", type=int, default=64, help="while routers are judged (default 64)")
    add("--budget-share", type=float, default=0.1, help="of what all SPARSE costs")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--thresholds", type=float, nargs="+", default=[0.5, 0.9])
    add("--baseline", choices=BASELINES, default=BASELINES[0], help="cpu_attn for a trial on a CPU")
    add("--answering", nargs=argparse.REMAINDER, default=[],
        help="the last option: further arguments of `real_tasks answer`")  # fmt: skip
    found = vars(parser.parse_args())
    for name in ("seeds", "thresholds", "answering"):
        found[name] = tuple(found[name])
    return Study(**found)


if __name__ == "__main__":
    main()
