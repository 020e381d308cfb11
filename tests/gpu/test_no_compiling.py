"""No kernel of ours is compiled once the server is ready, whatever requests come then.

Oracle: Triton's own hook, which it calls for every kernel that is new in the process, compiled or
read from its cache on disk; what one case compiled is forgotten before the next one starts. Kernels
of vLLM's are noted and printed only.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import triton

from tests.helpers.engine import Engine
from tests.helpers.kernel_cache import forget_kernels
from tests.helpers.models import random_prompt, write_bfloat16_llama

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

SINK_TOKENS, WINDOW_TOKENS = 32, 128
DEFAULTS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "enable_prefix_caching": True,
    "max_num_seqs": 16,
    # Holds a batch of the tile of many tokens.
    "max_num_batched_tokens": 4352,
    "kv_cache_memory_bytes": 2 << 30,  # XAttention's lists come out of it
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
CASES = {
    "triangle-fa3": {"sparse_pattern": "triangle", "kernels": "fa3"},
    "streaming-fa3": {"sparse_pattern": "streaming", "kernels": "fa3"},
    "xattention-fa3": {"sparse_pattern": "xattention", "kernels": "fa3"},
    "triangle-triton": {"sparse_pattern": "triangle", "kernels": "triton"},
    "xattention-triton": {"sparse_pattern": "xattention", "kernels": "triton"},
    "static-fa3": {"policy": "static", "sparse_layers": [0, 2], "kernels": "fa3"},
    "drafts-fa3": {"sparse_pattern": "triangle", "kernels": "fa3"},
    "drafts-triton": {"sparse_pattern": "streaming", "kernels": "triton"},
}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny bfloat16 Llama and a fitted router."""
    return write_bfloat16_llama(
        tmp_path_factory.mktemp("tiny"),
        head_dim=64,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
    )


@contextmanager
def compiled() -> Iterator[list[str]]:
    """List the kernels that are new in this process, by module and name."""
    names: list[str] = []

    def note(*args: Any, **kwargs: Any) -> None:
        function = kwargs["fn"]
        names.append(f"{getattr(function.module, '__name__', function.module)}.{function.name}")

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


def _prompts(*lengths: int) -> list[list[int]]:
    return [random_prompt(length, seed=length) for length in lengths]


def _abort(engine: Engine) -> None:
    """End requests in the middle of their prompts and of their answers."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    for index, prompt in enumerate(_prompts(2500, 3000, 700)):
        core.add_request(
            f"aborted-{index}",
            {"prompt_token_ids": prompt},
            SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, detokenize=False),
        )
    for index in range(3):
        for _ in range(3):
            core.step()
        core.abort_request([f"aborted-{index}"])
    while core.has_unfinished_requests():
        core.step()


def _serve(engine: Engine) -> None:
    """Requests of every kind that a day has."""
    engine.generate(_prompts(5), 8)  # short
    engine.generate(_prompts(3001), 8)  # long
    engine.generate(_prompts(3001), 8)  # whose prefix is cached
    engine.generate(_prompts(150), 40)  # grows long in decode
    engine.generate(_prompts(1, 15, 161, 700, 1500, 3500, 40, 900), 24)  # mixed
    engine.generate(_prompts(*range(200, 212)), 300)  # more rows than blocks: preempted
    _abort(engine)
    engine.limit_chunks(97)
    engine.generate(_prompts(98, 500, 1030), 12)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_compiled_after_the_start(files: tuple[Path, Path], name: str) -> None:
    flux = {"sink_tokens": SINK_TOKENS, "window_tokens": WINDOW_TOKENS} | CASES[name]
    arguments = DEFAULTS | ({"speculative_config": NGRAM} if "drafts" in name else {})
    if "policy" not in flux:
        flux = {key: value for key, value in flux.items() if not key.endswith("_tokens")}
        flux |= {"router": str(files[1])}
    forget_kernels()
    with (
        compiled() as at_start,
        Engine(files[0], flux, num_gpu_blocks_override=350, **arguments) as engine,
        compiled() as later,
    ):
        begin = time.monotonic()
        _serve(engine)
        seconds = time.monotonic() - begin
    ours = [kernel for kernel in at_start if kernel.startswith("flux_vllm")]
    print(
        f"\n{name}: {len(ours)} of our kernels at the start, {seconds:.1f} s of requests, after it "
        f"{later}",
        flush=True,
    )
    assert ours
    assert [kernel for kernel in later if kernel.startswith("flux_vllm")] == []
