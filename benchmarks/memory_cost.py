"""Memory that flux takes from the KV cache: query sums and views, by the sizes that it serves with.

    python -m benchmarks.memory_cost --model SHAPE_FOLDER --out OUT.json [--engine]

Asks `startup.reserve_side_tables`, as the worker does, for each tensor-parallel size and KV cache
dtype (`memory` rows); nothing is allocated. What vLLM leaves for the KV cache is estimated: its
default share of the GPU, less this rank's weights and --other-gib for everything else. A float8 KV
cache is half as large beside the same sums: those rows say what one costs or, where flux refuses
it, would cost.

--engine also loads the model with a router of random weights at vLLM's default settings, keeps what
that function was asked and answered there, and answers prompts (`memory_engine` row): running out
of memory would show.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.row_file import RowFile, say
from benchmarks.serve_cases import CHUNK, K, Shape

POOL_TOKENS, SINK_TOKENS, WINDOW_TOKENS = 96, 128, 2048


def main() -> None:
    """Print the sizes and write them."""
    args = _parse()
    rows = RowFile(args.out)
    config = json.loads((args.model / "config.json").read_text())
    config["max_position_embeddings"] = args.max_model_len
    for ranks in (1, 2, 8):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            row = side_tables(config, ranks, dtype, args.gpu_gib, args.other_gib, args.rows)
            line = (
                f"TP {ranks} {row['kv_cache_dtype']:14s} {row['side_mib']:8.1f} MiB "
                f"({row['fixed_mib']:.1f} of them whatever the KV cache), "
                f"{row['percent']:.3f} % of {row['available_gib']:.1f} GiB"
            )
            rows.keep((ranks, dtype), row, line)
    if args.engine:
        row = engine_side_tables(args)
        line = (
            f"an engine: {row['side_mib']:.1f} MiB, {row['percent']:.3f} % of "
            f"{row['available_gib']:.2f} GiB; most memory it held: {row['peak_gib']} GiB"
        )
        rows.keep("engine", row, line)


def side_tables(
    config: dict[str, Any],
    ranks: int,
    kv_dtype: torch.dtype,
    gpu_gib: float,
    other_gib: float,
    max_rows: int,
) -> dict[str, Any]:
    """Return a row: what `reserve_side_tables` takes on one rank.

    Args:
        config: the model's config.json; its dtype is bfloat16, and it is served to its full length.
        ranks: of tensor parallelism.
        kv_dtype: of the KV cache.
        gpu_gib: memory of the GPU.
        other_gib: of it, what neither weights nor KV cache take.
        max_rows: most rows of a batch.
    """
    from vllm.config import CacheConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from flux_vllm.attention_backend.cuda.backend import fixed_nbytes
    from flux_vllm.startup import reserve_side_tables

    shape = Shape.of(config)
    share = CacheConfig().gpu_memory_utilization
    available = int(2**30 * (gpu_gib * share - other_gib) - weights_nbytes(config) / ranks)
    spec = FullAttentionSpec(
        block_size=16,
        num_kv_heads=max(1, shape.kv_heads // ranks),
        head_size=shape.head_dim,
        dtype=kv_dtype,
    )
    worker = SimpleNamespace(
        device=torch.device("cuda"),
        get_kv_cache_spec=lambda: dict.fromkeys(range(shape.layers), spec),
        vllm_config=_engine_sizes(config, shape, ranks, max_rows),
    )
    runtime = _runtime(shape)
    left = reserve_side_tables(available, worker, runtime)
    fixed = fixed_nbytes(runtime, worker.vllm_config, [spec])
    return {
        "metric": "memory",
        "tensor_parallel": ranks,
        "kv_cache_dtype": str(kv_dtype).removeprefix("torch."),
        "gpu_gib": gpu_gib,
        "gpu_memory_utilization": share,
        "max_rows": max_rows,
        "max_model_len": config["max_position_embeddings"],
        "available_gib": available / 2**30,
        "side_mib": (available - left) / 2**20,
        "fixed_mib": fixed / 2**20,  # views and workspaces: they do not grow with the KV cache
        "percent": 100 * (1 - left / available),
        "percent_of_kv_cache": 100 * (available / left - 1),
    }


def weights_nbytes(config: dict[str, Any]) -> int:
    """Return the bytes of a Llama's bfloat16 weights, norms left out."""
    shape = Shape.of(config)
    hidden = config["hidden_size"]
    attention = 2 * hidden * (shape.heads + shape.kv_heads) * shape.head_dim
    layer = attention + 3 * hidden * config["intermediate_size"]
    tables = 1 if config.get("tie_word_embeddings") else 2
    return 2 * (shape.layers * layer + tables * shape.vocab_size * hidden)


def _runtime(shape: Shape) -> Any:
    from flux_vllm.config import FluxConfig
    from flux_vllm.router.checkpoint import RouterInfo
    from flux_vllm.router.model import LayerRouter
    from flux_vllm.runtime import FluxRuntime

    info = RouterInfo(
        base_model="",
        num_layers=shape.layers,
        head_dim=shape.head_dim,
        pool_tokens=POOL_TOKENS,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
    )
    with torch.device("meta"):
        router = LayerRouter(shape.layers, shape.head_dim)
    return FluxRuntime(
        FluxConfig(),
        router,
        info,
        shape.layers,
        tuple(range(shape.layers)),
        1,
        torch.device("cpu"),
        lambda pooled: pooled,
    )


def _engine_sizes(config: dict[str, Any], shape: Shape, ranks: int, max_rows: int) -> Any:
    """Make the part of vLLM's configuration that sizes depend on."""
    model = SimpleNamespace(
        get_num_attention_heads=lambda parallel: shape.heads // ranks,
        get_head_size=lambda: shape.head_dim,
        dtype=torch.bfloat16,
        max_model_len=config["max_position_embeddings"],
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=max_rows, max_num_batched_tokens=CHUNK),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=512),
    )


def engine_side_tables(args: argparse.Namespace) -> dict[str, Any]:
    """Return a row: what an engine at vLLM's default memory settings set aside, then answered."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker is then in this process
    from vllm import LLM, SamplingParams

    from benchmarks.bench_overhead import write_random_router
    from flux_vllm import startup

    shape = Shape.of(json.loads((args.model / "config.json").read_text()))
    asked: list[tuple[int, int]] = []

    def noted(available: int, *others: Any) -> int:
        asked.append((available, reserve(available, *others)))
        return asked[-1][1]

    reserve, startup.reserve_side_tables = startup.reserve_side_tables, noted
    with tempfile.TemporaryDirectory() as folder:
        router = write_random_router(
            shape, Path(folder), SINK_TOKENS, WINDOW_TOKENS, pool_tokens=POOL_TOKENS
        )
        llm = LLM(
            model=str(args.model),
            load_format=args.load_format,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            skip_tokenizer_init=True,
            distributed_executor_backend="uni",  # likewise the worker's
            attention_backend="flux",
            additional_config={"flux": {"router": str(router)}},
            **args.engine_arguments,
        )
    [(available, left)] = asked
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    tokens = min(args.prompt_tokens, args.max_model_len - 64)
    say(f"{blocks} KV blocks; answering {args.prompts} prompts of {tokens} tokens")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, shape.vocab_size, (args.prompts, tokens), generator=generator)
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts.tolist()], sampling, use_tqdm=False
    )
    assert all(len(output.outputs[0].token_ids) == 32 for output in outputs)
    has_gpu = torch.cuda.is_available()
    return {
        "metric": "memory_engine",
        "available_gib": available / 2**30,
        "side_mib": (available - left) / 2**20,
        "percent": 100 * (1 - left / available),
        "kv_blocks": blocks,
        "block_size": llm.llm_engine.vllm_config.cache_config.block_size,
        "prompts": args.prompts,
        "prompt_tokens": tokens,
        "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if has_gpu else None,
        "gpu_gib": torch.cuda.mem_get_info()[1] / 2**30 if has_gpu else None,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json (and weights)")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--gpu-gib", type=float, default=79.6, help="memory of the GPU (default 79.6, an H100)")
    add("--other-gib", type=float, default=3, help="beside weights and KV cache (default 3)")
    add("--rows", type=int, default=1024, help="max_num_seqs (default 1024, vLLM's on such a GPU)")
    add("--max-model-len", type=int, default=128 * K, help="tokens of a request (default 131072)")
    add("--engine", action="store_true", help="load the model too")
    add("--load-format", default="auto", help="`dummy` for random weights (default auto)")
    add("--dtype", default="bfloat16")
    add("--prompts", type=int, default=12, help="that the engine answers (default 12)")
    add("--prompt-tokens", type=int, default=32 * K, help="of each (default 32768)")
    add("--engine-arguments", type=json.loads, default={}, help="JSON object for `vllm.LLM`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
