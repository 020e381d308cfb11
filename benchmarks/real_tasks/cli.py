"""Evaluation on real tasks through the served engine.

    python -m benchmarks.real_tasks run --model M --eval EVAL_FOLDER --out RUN_FOLDER \\
        --variant flash_attn --variant full --variant sparse --variant static:0-6 \\
        --variant router:ROUTER@0.3,0.5,0.7 --flux '{"router": "ROUTER"}'

answers LongBench, needles, GSM8K and chains of thought under every variant, measures agreement with
full attention's own answers, and joins everything in RUN_FOLDER. Each engine is a `vllm serve` of
its own; `answer` is one engine's part, `join` the last step, and both can be called by themselves.
docs/REAL_TASKS.md explains what is measured.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.real_tasks import joining
from benchmarks.real_tasks.answering import SPEED, Answering, Family
from benchmarks.real_tasks.engine import ServedEngine
from benchmarks.real_tasks.needles import make_needles
from benchmarks.real_tasks.samples import Encoder
from benchmarks.real_tasks.speed import SpeedCases
from benchmarks.real_tasks.store import ResultFolder
from benchmarks.real_tasks.tasks import FAMILIES, TaskOptions, load
from benchmarks.real_tasks.variants import (
    BASELINES,
    EngineOptions,
    parse_variants,
    server_arguments,
)
from benchmarks.row_file import say, time_limit
from demo.server import leave_on_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    Returns: exit status.
    """
    args = _parse(argv)
    leave_on_signals()
    status: int = args.command(args)
    return status


def _run(args: argparse.Namespace) -> int:
    """Start every engine in a process of its own, several side by side, and join what they find."""
    variants = parse_variants(args.variant, args.seed)
    baselines = [variant.label for variant in variants if variant.policy in BASELINES]
    if len(baselines) != 1:
        raise ValueError(f"expected one of the variants {BASELINES}, found {baselines or 'none'}")
    (args.baseline_label,) = baselines
    engines: dict[str, list[str]] = {}
    for text in args.variant:
        (engine,) = {variant.engine for variant in parse_variants([text])}
        engines.setdefault(engine, []).append(text)
    # The teacher first: the others wait for its answers.
    order = sorted(engines, key=lambda engine: engine not in BASELINES)
    commands = []
    for engine in order:
        command = [sys.executable, "-m", "benchmarks.real_tasks", "answer", *_shared_flags(args)]
        command += [part for text in engines[engine] for part in ("--variant", text)]
        commands.append([*command, "--server-arguments", *args.server_arguments])
    statuses = run_side_by_side(commands, args.side_by_side, _devices())
    failed = [engine for engine, status in zip(order, statuses, strict=True) if status]
    if failed:
        say(f"these engines failed, their logs lie in {args.out}: {', '.join(failed)}")
    joining.write(joining.join([args.out]), args.out / "real_tasks.json")
    return 1 if failed else 0


def run_side_by_side(
    commands: Sequence[Sequence[str]], at_once: int, devices: Sequence[str]
) -> list[int]:
    """Run commands, so many at a time; those that still run end with this process.

    Args:
        commands: in the order in which they begin.
        at_once: processes.
        devices: GPUs, of which a command sees one; as many at a time on each as come to its share;
            none: a CPU.

    Returns: exit status of each command.
    """
    processes: list[subprocess.Popen[bytes]] = []
    starting, ending = threading.Lock(), threading.Event()
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in range(at_once):
        free.put({"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {})

    def run(command: Sequence[str]) -> int:
        device = free.get()
        with starting:
            if ending.is_set():
                return 1
            process = subprocess.Popen(command, env=os.environ | device)
            processes.append(process)
        status = process.wait()
        free.put(device)
        return status

    pool = ThreadPoolExecutor(at_once)
    try:
        waiting = [pool.submit(run, command) for command in commands]
        wait(waiting, return_when=FIRST_EXCEPTION)
        return [future.result() for future in waiting if future.done()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        with starting:
            ending.set()
            for process in processes:
                process.terminate()
        for process in processes:
            process.wait()


def _devices() -> list[str]:
    """Return the visible GPUs' names, none on a CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _shared_flags(args: argparse.Namespace) -> list[str]:
    """Write the flags of `run` that each `answer` gets too."""
    flags: list[str] = []
    for name in args.shared:
        value = getattr(args, name)
        if value is None:
            continue
        flags.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            flags.append(json.dumps(value))
        elif isinstance(value, list | tuple):
            flags += map(str, value)
        else:
            flags.append(str(value))
    return flags


def _answer(args: argparse.Namespace) -> int:
    """Answer for variants that share an engine."""
    variants = parse_variants(args.variant, args.seed)
    engines = {variant.engine for variant in variants}
    if len(engines) != 1:
        raise ValueError(
            f"expected variants that share an engine, found {sorted(engines)}; answer them apart, "
            "or use the command run"
        )
    options = _engine_options(args)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(args.model))
    encoder = Encoder(tokenizer, options.max_model_len, args.template)
    families = [
        Family.of(name, [encoder.encode(sample) for sample in load(name, _task_options(args))])
        for name in FAMILIES
        if name in args.tasks
    ]
    for family in families:
        cut = sum(one.cut_tokens > 0 for one in family.asked)
        say(f"{family.name}: {len(family.asked)} prompts, {cut} cut in the middle")
        if cut and family.name == "needles":
            raise ValueError(
                f"expected needles that fit {options.max_model_len} tokens, found {cut} longer "
                "ones, whose facts a cut may lose; lower --needle-tokens"
            )
    compared = [one for one in families if one.is_compared and args.agreement == "yes"]
    speeds = _speeds(args)
    answering = Answering(
        options, variants, _num_layers(args.model), ResultFolder(args.out), time_limit(args.seconds)
    )
    if not answering.is_anything_missing(families, compared, speeds):
        say(f"nothing is missing of {', '.join(one.label for one in variants)}")
        return 0
    arguments = server_arguments(options, variants, forces_tokens=bool(compared))
    log = args.out / f"{variants[0].label}.log"
    say(f"starting a server for {', '.join(one.label for one in variants)}; its log: {log}")
    with ServedEngine(arguments, log, options.runner, args.at_once) as engine:
        answering.answer(engine, families)
        folder = args.teacher or args.out / args.baseline_label
        answering.agree(engine, compared, folder, args.teacher_seconds)
        if speeds is not None:
            with _held(args.speed_lock):
                answering.measure_speed(engine, speeds, encoder)
    return 0


@contextmanager
def _held(path: Path | None) -> Iterator[None]:
    """Hold a file's lock alone, once whoever holds it lets go."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _speeds(args: argparse.Namespace) -> SpeedCases | None:
    if SPEED not in args.tasks:
        return None
    return SpeedCases(tuple(args.speed_tokens), tuple(args.speed_at_once), args.speed_prompts)


def _num_layers(model: Path) -> int:
    layers: int = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return layers


def _join(args: argparse.Namespace) -> int:
    """Join folders of `answer`."""
    joining.write(joining.join(args.folders), args.out)
    return 0


def _needles(args: argparse.Namespace) -> int:
    """Write needles as a file that does not depend on the Python version."""
    least, most = args.tokens
    samples = make_needles(args.count, least, most, args.seed)
    lines = []
    for sample in samples:
        fields = dataclasses.asdict(sample)
        kept = ("task", "id", "prompt", "answers", "max_new_tokens", "chat")
        lines.append(json.dumps({name: fields[name] for name in kept}, ensure_ascii=False))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    say(f"{args.out}: {len(samples)} prompts")
    return 0


def _engine_options(args: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        model=args.model,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        chunk=args.chunk,
        max_num_seqs=args.max_num_seqs,
        kv_gib=args.kv_gib,
        runner=args.runner,
        flux=args.flux or {},
        arguments=tuple(args.server_arguments),
    )


def _task_options(args: argparse.Namespace) -> TaskOptions:
    return TaskOptions(
        folder=args.eval,
        split=args.split,
        needles=args.needles,
        needle_tokens=tuple(args.needle_tokens),
        needle_file=args.needle_file,
        prompts=args.prompts,
        prompt_new_tokens=args.prompt_new_tokens,
        chains=args.chains,
        chain_new_tokens=tuple(args.chain_new_tokens),
        limit=args.limit,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="answer under every variant, and join")
    shared = _add_answer_flags(run)
    run.add_argument("--side-by-side", type=int, default=1,
                     help="engines at a time, in turn on the visible GPUs (default 1)")  # fmt: skip
    run.set_defaults(command=_run, shared=shared)
    answer = commands.add_parser("answer", help="answer for variants that share an engine")
    _add_answer_flags(answer)
    answer.set_defaults(command=_answer)
    for command in (run, answer):
        command.add_argument("--server-arguments", nargs=argparse.REMAINDER, default=[],
                             help="the last option: all else goes to `vllm serve`")  # fmt: skip
    join = commands.add_parser("join", help="compare with full attention: rows, tables, plots")
    join.add_argument("folders", nargs="+", type=Path, help="--out of `answer`")
    join.add_argument("--out", type=Path, required=True, help="JSON file; tables and plots beside")
    join.set_defaults(command=_join)
    needles = commands.add_parser("needles", help="write needles for --needle-file")
    needles.add_argument("--out", type=Path, required=True)
    needles.add_argument("--count", type=int, default=40)
    needles.add_argument("--tokens", type=int, nargs=2, default=(3000, 28000))
    needles.add_argument("--seed", type=int, default=0)
    needles.set_defaults(command=_needles)
    return parser.parse_args(argv)


def _add_answer_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Add what `run` hands on to each `answer`; return the names."""
    parser.add_argument("--variant", action="append", required=True, help="see variants.py")
    names = []

    def add(flag: str, **options: Any) -> None:
        names.append(parser.add_argument(flag, **options).dest)

    add("--model", type=Path, required=True, help="folder with weights and tokenizer")
    add("--eval", type=Path, required=True, help="folder with longbench_dev.jsonl, gsm8k_dev.jsonl")
    add("--split", default="dev", help="of these files (default dev)")
    add("--out", type=Path, required=True, help="folder for results and logs")
    add("--flux", type=json.loads, help="flux configuration of all flux engines, JSON")
    add("--seed", type=int, help="of the router's training, for the rows")
    add("--tasks", nargs="+", choices=(*FAMILIES, SPEED), default=["longbench", "needles", "gsm8k"])
    add("--prompts", type=Path, help="JSON Lines of further prompts, for the family prompts")
    add("--prompt-new-tokens", type=int, default=64, help="of an answer to these (default 64)")
    add("--needles", type=int, default=40, help="prompts (default 40)")
    add("--needle-tokens", type=int, nargs=2, default=(3000, 28000), help="shortest and longest")
    add("--needle-file", type=Path, help="written by the command needles; default: made anew")
    add("--chains", type=int, default=16, help="chains of thought (default 16)")
    add("--chain-new-tokens", type=int, nargs=2, default=(2000, 2560), help="least and most")
    add("--limit", type=int, help="of samples a task, for a trial")
    add("--template", type=json.loads, help="options of the chat template, JSON")
    add("--teacher", type=Path, help="folder of full attention's answers (default OUT/flash_attn)")
    add("--teacher-seconds", type=float, default=420, help="to wait for them (default 420)")
    add(
        "--baseline-label", default=BASELINES[0], help="folder in OUT with full attention's answers"
    )
    add("--max-model-len", type=int, default=32768, help="prompt and answer (default 32768)")
    add("--chunk", type=int, default=8192, help="prefill tokens a step (default 8192)")
    add("--max-num-seqs", type=int, default=64, help="of the engine (default 64)")
    add("--at-once", type=int, default=32, help="requests in flight (default 32)")
    add("--dtype", default="bfloat16")
    add("--kv-gib", type=float, help="KV cache of each engine; default: what vLLM finds free")
    add("--runner", choices=("v1", "v2"), default="v2", help="vLLM's model runner (CPU: v1)")
    add("--speed-tokens", type=int, nargs="+", default=[16384, 31000], help="of timed prompts")
    add("--speed-at-once", type=int, nargs="+", default=[1, 16], help="timed requests in flight")
    add("--speed-prompts", type=int, default=8, help="timed at each, at least (default 8)")
    add("--speed-lock", type=Path,
        help="file to lock while timing: engines of one GPU are timed in turn")  # fmt: skip
    add("--seconds", type=float, help="begin no measure after so many seconds")
    add("--agreement", choices=("yes", "no"), default="yes", help="with full attention's answers")
    return names
