"""A float8 KV cache on a GPU: policy `full` is FLASH_ATTN's, routes cost no more than float8 does.

Oracle: for `full`, stock vLLM with the same cache, both uncompiled, to the bit. Else
tests/helpers/reference.py with keys as they are: at most twice the error that FLASH_ATTN makes over
a float8 cache, against the same reference with all layers FULL. The kernels themselves are held to
their oracle in tests/unit/attention_backend, with scales other than 1.
"""

from pathlib import Path

import pytest

from tests.helpers.engine import Answer, Engine
from tests.helpers.models import random_prompt, write_bfloat16_llama
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, SparsePattern
from tests.helpers.replay import logprob_errors, replay

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE = 32, 128, 16
ROUTES = [SPARSE, FULL, SPARSE, FULL]
LENGTHS = [15, 161, 500, 1100, 3001]
DEFAULTS = {
    "dtype": "bfloat16",
    "kv_cache_dtype": "fp8",
    "enforce_eager": False,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 2 << 30,  # XAttention's lists come out of it
}
UNCOMPILED = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""Engines of different attention backends compile apart: sums of another order, and queries that
are quantized from what was not rounded before, would differ in their last bits."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_bfloat16_llama(
        tmp_path_factory.mktemp("tiny"),
        head_dim=128,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
    )


def answers_of(folder: Path, flux: dict | None, **arguments: object) -> list[Answer]:
    """Ask one prompt after the other, so that batches are alike."""
    with Engine(folder, flux, **(DEFAULTS | arguments)) as engine:
        return [
            engine.generate([random_prompt(length, seed=length)], 24, prompt_logprobs=True)[0]
            for length in LENGTHS
        ]


@pytest.fixture(scope="module")
def stock(folders: tuple[Path, Path]) -> list[Answer]:
    return answers_of(folders[0], None, attention_backend="FLASH_ATTN")


def worst(folder: Path, answers: list[Answer], routes: list[int], kind: str) -> list[float]:
    """Return the largest error of the prompts' and of the output tokens' log-probabilities."""
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE, kind)
    reference = ReferenceModel(folder)
    errors = [
        logprob_errors(answer, replay(reference, answer, pattern, routes, follow_tokens=True))
        for answer in answers
    ]
    return [max(column) for column in zip(*errors, strict=True)]


def test_full_is_flash_attns(folders: tuple[Path, Path]) -> None:
    pair = [
        answers_of(folders[0], flux, compilation_config=UNCOMPILED, **backend)
        for flux, backend in ((None, {"attention_backend": "FLASH_ATTN"}), ({"policy": "full"}, {}))
    ]
    for own, ours in zip(*pair, strict=True):
        assert (own.tokens, own.logprobs) == (ours.tokens, ours.logprobs)
        assert own.prompt_logprobs == ours.prompt_logprobs


@pytest.mark.parametrize("kernels", ["fa3", "triton"])
@pytest.mark.parametrize("kind", ["streaming", "triangle"])
def test_static_routes(
    folders: tuple[Path, Path], stock: list[Answer], kind: str, kernels: str
) -> None:
    flux = {
        "policy": "static",
        "sparse_layers": [0, 2],
        "sink_tokens": SINK_TOKENS,
        "window_tokens": WINDOW_TOKENS,
        "sparse_pattern": kind,
        "kernels": kernels,
    }
    allowed = worst(folders[0], stock, [FULL] * 4, kind)
    found = worst(folders[0], answers_of(folders[0], flux), ROUTES, kind)
    for error, most in zip(found, allowed, strict=True):
        assert error < 2 * most


@pytest.mark.parametrize("kernels", ["fa3", "triton"])
def test_router_decides_as_over_a_bfloat16_cache(folders: tuple[Path, Path], kernels: str) -> None:
    """The probe's queries are not quantized; XAttention chooses and attends by the same cache."""
    model, router = folders
    flux = {
        "policy": "router",
        "router": str(router),
        "kernels": kernels,
        "sparse_pattern": "xattention",
    }
    pairs = [answers_of(model, flux, kv_cache_dtype=kind) for kind in ("fp8", "auto")]
    routed = [(answer, other) for answer, other in zip(*pairs, strict=True) if answer.routes]
    assert routed
    for answer, other in routed:
        assert answer.p_full == other.p_full
        assert answer.logprobs != other.logprobs
