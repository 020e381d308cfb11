"""Quality and speed of a router on a real server, beside vLLM's own attention and offline scoring.

    python -m training prompts --model M --data.corpus C --out runs/p --prompts 25 \\
        --variants cached --variant_prompts 25 --data.tasks needle multi_key variable_tracking \\
        repeat_end list_end continue_text code_completion
    python -m benchmarks.serve_quality --model M --router DIR --prompts runs/p/prompts.jsonl \\
        --cached runs/p/cached.jsonl --out runs/serve_quality.json

Starts `vllm serve` with vLLM's own backend, then with flux and `policy: router`, one after the
other, each with the whole machine and the same flags. Both are asked every prompt through the
OpenAI API, several at a time, so that prompts come in chunks beside each other. The tokens go in as
they are scored offline. Routes come from the prompt alone; the answer's prefix is then forced token
by token (`forced_tokens.py`), and only what follows counts:

- `exact` tasks: the server goes on greedily by itself; every token of the answer has to be right.
- `tokens` tasks: the answer is forced as well, and a token counts where the model's own
  log-probabilities put it first. So both metrics are those of offline scoring. Reasoning tasks are
  of this kind, and decode as many tokens as their length bucket says: they take long.

Speed on the same servers: the longest prompts, streamed, one at a time and several, each from a
process of its own and by its clock: TTFT, and time between a request's tokens after the first.

--cached asks retrieval questions twice: alone, and after a local question on the same document,
whose KV is then in the prefix cache. All else is kept apart by a cache salt for each request.

Last, without a server, the same prompts are scored as `python -m training eval` does, each in one
chunk and alone, with the router and with full attention. What becomes of a context that another
request computed is measured on the server only.

Every measure is a row in --out, kept as soon as it is there: the same command begun again measures
what is missing. Tables go to stdout.
"""

import argparse
import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import quality_report as report
from benchmarks.quality_client import SERVED_NAME, Client
from benchmarks.row_file import RowFile, say, time_limit
from demo.server import Server, leave_on_signals
from flux_vllm.patterns import make_pattern
from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.place import locate_router
from training.config import SystemSettings
from training.data.encoding import Encoded
from training.distributed import start_world
from training.evaluation.prompts import PromptSet, read_prompts
from training.evaluation.scoring import Scorer, Scores
from training.model_loading import load_routed, load_tokenizer
from training.policies import StaticPolicy, ThresholdPolicy

OFFLINE_TOKENS = 32768
"""Computed at once by offline scoring."""

Row = dict[str, Any]


class ResumedRows(RowFile):
    """Rows by backend and measure, with those that an earlier run of the same settings left.

    Args:
        path: of the file.
        settings: what all its rows depend on.

    Raises: ValueError: the file holds rows of other settings.
    """

    def __init__(self, path: Path, settings: Row) -> None:
        super().__init__(path)
        self._settings = settings
        for row in json.loads(path.read_text()) if path.exists() else []:
            if row["settings"] != settings:
                raise ValueError(
                    f"{path}: expected rows of {settings}, found some of {row['settings']}; give "
                    "another --out, or delete the file"
                )
            self._rows[row["backend"], row["measure"]] = row

    def missing(self, backend: str, measures: Sequence[str]) -> list[str]:
        """Return those measures that have no row yet."""
        return [measure for measure in measures if (backend, measure) not in self._rows]

    def add(self, backend: str, measure: str, row: Row, line: str) -> None:
        """Keep a row, and print a line about it."""
        named = {"backend": backend, "measure": measure, "settings": self._settings}
        self.keep((backend, measure), named | row, f"{backend}, {measure}: {line}")

    def of(self, backend: str) -> dict[str, Row]:
        """Return a backend's rows by measure."""
        return {row["measure"]: row for row in self._rows.values() if row["backend"] == backend}


def main() -> int:
    """Measure what is missing and print tables.

    Returns: exit status.
    """
    args = _parse()
    leave_on_signals()
    made, _ = read_prompts(args.prompts)
    cached, before = read_prompts(args.cached) if args.cached else (None, [])
    if cached and not before:
        raise ValueError(
            f"{args.cached}: expected rows with `before`, found none; give the cached.jsonl that "
            "`python -m training prompts --variants cached` writes"
        )
    rows, in_time = ResumedRows(args.out, _settings(args)), time_limit(args.seconds)
    for backend in args.backends:
        _measure_server(args, backend, made, cached, before, rows, in_time)
    if in_time():
        _score_offline(args, made, cached, rows)
    for table in tables(made, cached, rows):
        say(f"\n{table}")
    return 0


def _measure_server(
    args: argparse.Namespace,
    backend: str,
    made: PromptSet,
    cached: PromptSet | None,
    before: Sequence[Encoded],
    rows: ResumedRows,
    in_time: Callable[[], bool],
) -> None:
    speeds = {f"speed at {count}": count for count in args.concurrency}
    twice = ["cached alone", "cached after"] if cached and backend == "flux" else []
    missing = rows.missing(backend, ["quality", *twice, *speeds])
    if not missing or not in_time():
        return
    log = args.out.with_suffix(f".{backend}.log")
    say(f"starting a server with {backend}; its log: {log}")
    os.environ |= server_environment(args.runner)
    longest = _longest(made, args.output, args.max_model_len)[: args.speed_prompts]
    with Server(server_arguments(args, backend), log, start_seconds=600) as server:
        client = Client(server.url, load_tokenizer(str(args.model)), backend == "flux")
        for measure in missing:
            if not in_time():
                say(f"no time is left for {backend}, {measure}")
                return
            title = f"{backend}, {measure}"
            if measure in speeds:
                row = client.time(longest, args.output, speeds[measure], title)
                line = f"TTFT {row['ttft_ms']['median']:.1f} ms, {sum(row['bursts'])} bursts"
            else:
                asked = made if measure == "quality" else cached
                assert asked is not None  # the measure is then not among those missing
                earlier = before if measure == "cached after" else []
                row = client.ask(asked.prompts, earlier, args.at_once, title)
                line = f"mean score {sum(row['score']) / len(row['score']):.3f}"
            if backend == "flux":
                _assert_all_routed(server)
            rows.add(backend, measure, row, line)


def _longest(made: PromptSet, output: int, max_model_len: int) -> list[Encoded]:
    """Return prompts of the greatest length with room for the output, tasks in turn.

    Those of reasoning tasks are short: their length is the answer's.

    Raises: ValueError: there are none.
    """
    of_task: dict[str, list[Encoded]] = {}
    for prompt, length in zip(made.prompts, made.lengths, strict=True):
        is_long = length == max(made.lengths) and prompt.prompt_len >= length / 2
        if is_long and prompt.prompt_len + output <= max_model_len:
            of_task.setdefault(prompt.task, []).append(prompt)
    if not of_task:
        raise ValueError(
            f"expected prompts of {max(made.lengths)} tokens with room for {output} more within "
            f"--max-model-len {max_model_len}, found none; lower --output"
        )
    most = max(map(len, of_task.values()))
    return [group[at] for at in range(most) for group in of_task.values() if at < len(group)]


def _assert_all_routed(server: Server) -> None:
    lines = server.get("/metrics").splitlines()
    counts = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("flux_unrouted_rows_to")]
    if not counts or any(float(count) for count in counts):
        raise RuntimeError(
            f"expected flux_unrouted_rows_total to be 0 in /metrics, found {counts or 'no such'}; "
            "the server did not route every request"
        )


def server_environment(runner: str) -> dict[str, str]:
    """Return what servers are started with: plugins, model runner, this checkout's modules."""
    path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return {
        "VLLM_PLUGINS": "flux,flux_live",
        "VLLM_USE_V2_MODEL_RUNNER": {"v1": "0", "v2": "1"}[runner],
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
    }


def server_arguments(args: argparse.Namespace, backend: str) -> list[str]:
    """Return what follows `vllm serve`."""
    name = {"v1": "ForcedTokensV1", "v2": "ForcedTokensV2"}[args.runner]
    arguments = [
        *(str(args.model), "--served-model-name", SERVED_NAME, "--dtype", args.dtype),
        *("--attention-backend", args.baseline if backend == "baseline" else "flux"),
        *("--max-model-len", str(args.max_model_len), "--max-num-batched-tokens", str(args.chunk)),
        *("--generation-config", "vllm", "--enable-prompt-tokens-details"),
        *("--logits-processors", f"benchmarks.forced_tokens:{name}"),
        *args.server_arguments,
    ]
    if backend == "flux":
        flux = {"policy": "router", "router": str(args.router), "threshold": args.threshold}
        arguments += ["--additional-config", json.dumps({"flux": flux})]
    return arguments


def _score_offline(
    args: argparse.Namespace,
    made: PromptSet,
    cached: PromptSet | None,
    rows: ResumedRows,
) -> None:
    """Score as `python -m training eval` does, what has no row yet."""
    wanted = {
        "flux offline": ["quality", *(["cached alone"] if cached else [])],
        "baseline offline": ["quality"],
    }
    wanted = {name: rows.missing(name, measures) for name, measures in wanted.items()}
    if not any(wanted.values()):
        return
    say("scoring offline")
    router, info = read_router(args.router)
    world = start_world("auto")
    routed = load_routed(
        str(args.model),
        info.sink_tokens,
        info.window_tokens,
        SystemSettings(dtype=args.dtype),
        world,
    )
    router, inputs = routed.layers.narrow(router, info)
    pattern = make_pattern(info.sparse_pattern, info.sink_tokens, info.window_tokens)
    scorer = Scorer(routed, pattern, inputs, OFFLINE_TOKENS, world)
    policies = {
        "flux offline": ThresholdPolicy(router.to(world.device), args.threshold),
        "baseline offline": StaticPolicy.all_full(routed.num_layers),
    }
    for name, measures in wanted.items():
        for measure in measures:
            asked = made if measure == "quality" else cached
            assert asked is not None  # the measure is then not wanted
            found = scorer.score(asked.prompts, policies[name])
            rows.add(name, measure, offline_row(found), f"mean score {found.score.mean():.3f}")
    del scorer, routed
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def offline_row(scores: Scores) -> Row:
    """Make a row of offline scores."""
    return {
        "score": [round(float(value), 6) for value in scores.score],
        "routes": report.route_letters(scores.sparse),
    }


def tables(made: PromptSet, cached: PromptSet | None, rows: ResumedRows) -> list[str]:
    """Write everything that rows allow as Markdown tables, and which prompts differ."""
    found = []
    servers = {name: rows.of(name) for name in ("baseline", "flux")}
    servers = {name: of for name, of in servers.items() if "quality" in of}
    if servers:
        found.append(report.quality_and_speed_table(made.prompts, made.lengths, servers))
    for name in ("baseline", "flux"):
        offline = rows.of(f"{name} offline")
        for measure, row in rows.of(name).items():
            if measure not in offline:
                continue
            asked = made if measure == "quality" else cached
            if asked is None:
                continue
            compared = report.agreement(asked.prompts, asked.cells, row, offline[measure])
            found.append(report.agreement_table(f"{name}, {measure}", compared))
            found.extend(report.differing(asked.prompts, row, offline[measure]))
    flux = rows.of("flux")
    if cached and {"cached alone", "cached after"} <= flux.keys():
        found.append(
            report.cached_table(
                cached.prompts, cached.cells, flux["cached alone"], flux["cached after"]
            )
        )
    return found


def _settings(args: argparse.Namespace) -> Row:
    """Return what rows depend on; rows of other settings do not belong in the same file."""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    return {
        "model": args.model.name,
        "router": digest(locate_router(args.router)),
        "prompts": digest(args.prompts),
        "cached": digest(args.cached) if args.cached else None,
        "baseline": args.baseline,
        "threshold": args.threshold,
        "chunk": args.chunk,
        "at_once": args.at_once,
        "dtype": args.dtype,
        "runner": args.runner,
        "speed": [args.speed_prompts, args.output],
        "server_arguments": args.server_arguments,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with weights and tokenizer")
    add("--router", type=Path, required=True, help="router's file or folder")
    add("--prompts", type=Path, required=True, help="prompts.jsonl of `python -m training prompts`")
    add("--cached", type=Path, help="cached.jsonl of the same; default: not measured")
    add("--out", type=Path, required=True, help="JSON file for the rows; logs go beside it")
    add("--backends", nargs="+", choices=("baseline", "flux"), default=["baseline", "flux"])
    add("--baseline", default="FLASH_ATTN", help="vLLM's own backend (CPU_ATTN on a CPU)")
    add("--threshold", type=float, default=0.5, help="FULL where P(FULL) reaches it (default 0.5)")
    add("--chunk", type=int, default=2048,
        help="--max-num-batched-tokens of both servers: prefill chunk (default 2048)")  # fmt: skip
    add("--max-model-len", type=int, default=8192, help="of both servers, tokens (default 8192)")
    add("--at-once", type=int, default=8, help="requests in flight for quality (default 8)")
    add("--concurrency", nargs="+", type=int, default=[1, 8],
        help="requests in flight for speed (default 1 8)")  # fmt: skip
    add("--speed-prompts", type=int, default=32, help="timed at each (default 32)")
    add("--output", type=int, default=128, help="tokens of a timed answer (default 128)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="online and offline")
    add("--runner", choices=("v1", "v2"), default="v2" if torch.cuda.is_available() else "v1",
        help="vLLM's model runner (default v2 with CUDA; a CPU has v1 alone)")  # fmt: skip
    add("--seconds", type=float, help="begin no measure after so many seconds")
    add("--server-arguments", nargs=argparse.REMAINDER, default=[],
        help="the last option: all that follows goes to `vllm serve`")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
