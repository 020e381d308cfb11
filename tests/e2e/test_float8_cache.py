"""A float8 KV cache on a real engine: policy `full` as stock vLLM, routes as by the reference.

Oracle: tests/helpers/reference.py, whose history is cut to float8 as vLLM's CPU kernels cut it (by
definition, in tests/helpers/float8.py). A number that lies on the edge between two of float8 falls
to either side by the order of additions, which moves a log-probability more than float32 does.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flux_vllm.router.place import beside_weights
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Answer, Engine
from tests.helpers.float8 import ask_for_scaled_cache, cut
from tests.helpers.models import random_prompt
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import replay, token_errors

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
TOLERANCE = 0.02  # of nine tokens in ten
MOST = 0.1  # less than a wrong route costs (test_static_routes)
ROUTES = [SPARSE, FULL, SPARSE, FULL]
KINDS = ["fp8_e4m3", pytest.param("fp8_e5m2", marks=pytest.mark.long)]
LENGTHS = (161, 500, 1100)
# Another factor than a power of two moves what float8 can say.
SCALES = {(n, part): 2.0 ** (n - 2) * by for n in range(4) for part, by in (("k", 1.3), ("v", 1.7))}


def served(model: Path, flux: dict | None, kind: str, **arguments: object) -> Engine:
    return Engine(model, flux, kv_cache_dtype=kind, block_size=BLOCK_SIZE, **arguments)


def static(pattern: str = "streaming") -> dict:
    return {
        "policy": "static",
        "sparse_layers": [0, 2],
        "sink_tokens": SINK_TOKENS,
        "window_tokens": WINDOW_TOKENS,
        "sparse_pattern": pattern,
    }


def meant(pattern: str = "streaming") -> SparsePattern:
    return SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE, pattern)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference8(tiny_model: Path, kind: str) -> ReferenceModel:
    return ReferenceModel(tiny_model, keep=lambda given, *_: cut(given, kind))


def check(answer: Answer, reference: ReferenceModel, **how: object) -> None:
    request = replay(reference, answer, how.pop("pattern", meant()), follow_tokens=True, **how)
    prompt, output = token_errors(answer, request)
    errors = torch.tensor([*prompt, *output])
    errors = errors[~errors.isnan()]  # a prompt token whose predecessor was cached
    assert len(errors) >= len(answer.tokens)
    assert errors.quantile(0.9) < TOLERANCE
    assert errors.max() < MOST


def test_full_equals_cpu_attn(tiny_model: Path, kind: str) -> None:
    prompts = [random_prompt(length, seed=length) for length in (1, 33, *LENGTHS)]
    answers = []
    for flux in (None, {"policy": "full"}):
        arguments = {"max_num_batched_tokens": 256, "dtype": "bfloat16"}
        with served(tiny_model, flux, kind, **arguments) as engine:
            answers.append(engine.generate(prompts, 24))
    for own, ours in zip(*answers, strict=True):
        assert (own.tokens, own.logprobs) == (ours.tokens, ours.logprobs)
        assert ours.routes == [FULL] * 4


@pytest.fixture(scope="module", params=["streaming", "triangle", "xattention"])
def static_engine(
    request: pytest.FixtureRequest, tiny_model: Path, kind: str
) -> Iterator[tuple[Engine, SparsePattern]]:
    flux = static(request.param)
    with served(tiny_model, flux, kind, enable_prefix_caching=True) as engine:
        yield engine, meant(request.param)


@pytest.mark.parametrize("step_tokens", [4096, 97])
def test_static_equals_the_reference(
    static_engine: tuple[Engine, SparsePattern], reference8: ReferenceModel, step_tokens: int
) -> None:
    engine, pattern = static_engine
    engine.reset()
    engine.limit_steps(step_tokens)
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    for answer in engine.generate(prompts, 24, prompt_logprobs=True):
        check(answer, reference8, pattern=pattern, routes=ROUTES)


def test_static_on_a_prefix_hit(
    static_engine: tuple[Engine, SparsePattern], reference8: ReferenceModel
) -> None:
    engine, pattern = static_engine
    engine.reset()
    prompt = random_prompt(500, seed=5)
    (first,) = engine.generate([prompt], 24)
    (second,) = engine.generate([prompt + random_prompt(190, seed=6)], 24)
    assert second.cached_tokens == 480
    source = replay(reference8, first, pattern, ROUTES, follow_tokens=True).history
    check(second, reference8, pattern=pattern, routes=ROUTES, history=source)


def test_router_decides_as_with_any_cache(
    tiny_model: Path, kind: str, reference8: ReferenceModel, reference_router: ReferenceRouter
) -> None:
    """The probe has keys of its own, so its answer is the same to the last bit."""
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    answers = []
    for cache in (kind, "auto"):
        with served(tiny_model, {"policy": "router"}, cache) as engine:
            answers.append(engine.generate(prompts, 24, prompt_logprobs=True))
    for answer, other in zip(*answers, strict=True):
        assert answer.p_full == other.p_full
        assert answer.logprobs != other.logprobs
        check(answer, reference8, router=reference_router)


def test_keys_given_back_change_no_bit(tiny_model: Path) -> None:
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    answers = []
    for more in ({}, {"free_kv": True}):
        with served(tiny_model, static() | more, "fp8", max_num_batched_tokens=256) as engine:
            answers.append(engine.generate(prompts, 24))
    for kept, freed in zip(*answers, strict=True):
        assert (kept.tokens, kept.logprobs) == (freed.tokens, freed.logprobs)


def test_scales_of_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """It asks for a float8 cache by itself; a scale left out would show."""
    folder = tmp_path / "scaled"
    shutil.copytree(tiny_model, folder)
    assert beside_weights(folder).exists()
    ask_for_scaled_cache(folder, SCALES)
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    with served(folder, static(), "auto") as engine:
        answers = engine.generate(prompts, 24, prompt_logprobs=True)

    def keep(given: torch.Tensor, layer: int, part: str) -> torch.Tensor:
        return cut(given, "fp8", SCALES[layer, part])

    for answer in answers:
        check(answer, ReferenceModel(tiny_model, keep=keep), routes=ROUTES)
    unscaled = ReferenceModel(tiny_model, keep=lambda given, *_: cut(given, "fp8"))
    with pytest.raises(AssertionError):
        check(answers[1], unscaled, routes=ROUTES)
