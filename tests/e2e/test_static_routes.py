"""Policy `static` on a real engine against transformers in float32, under every sparse pattern.

Oracle: tests/helpers/reference.py. Covers the kernel path of FULL rows, compacted decode, exact
SPARSE prefill at any chunk offset (a chunk edge within a query block, within a prompt's tail),
batches of prompts and decodes, the prefix cache, and preemption. One engine serves all tests of a
pattern and block size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, Request, SparsePattern
from tests.helpers.replay import assert_same, logprob_errors, replay

pytestmark = pytest.mark.vllm

ROUTES = [SPARSE, FULL, SPARSE, FULL]
# Around sink + window = 160 and two of XAttention's blocks, then unaligned.
LENGTHS = [159, 160, 161, 255, 257, 500, 1100]
LONG = pytest.param([2001, 3001], marks=pytest.mark.long, id="long")


def flux(
    kind: str = "streaming", full_decode_tokens: int = 0, sparse_prefill: bool = False
) -> dict:
    return {
        "policy": "static",
        "sparse_layers": [0, 2],
        "sink_tokens": SINK_TOKENS,
        "window_tokens": WINDOW_TOKENS,
        "sparse_pattern": kind,
        "full_decode_tokens": full_decode_tokens,
        "sparse_prefill": sparse_prefill,
    }


@dataclass
class Served:
    """An engine, what its SPARSE layers mean, and what says what they should give."""

    engine: Engine
    pattern: SparsePattern
    reference: ReferenceModel

    def check(self, answer, history=None) -> Request:
        request = replay(self.reference, answer, self.pattern, ROUTES, history=history)
        assert_same(answer, request)
        return request


CASES = [
    ("streaming", 32),
    pytest.param(("streaming", 128), marks=pytest.mark.long),
    pytest.param(("triangle", 32), marks=pytest.mark.long),
    ("triangle", 128),
    ("xattention", 32),
    # Sparse from the tenth token of an answer on, and prompts under SPARSE in every layer.
    ("streaming", 32, 9),
    ("triangle", 32, 9, True),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def shared(request, tiny_model, reference) -> Iterator[Served]:
    kind, block_size, *phases = request.param
    config = flux(kind, *phases)
    with Engine(tiny_model, config, block_size=block_size, enable_prefix_caching=True) as engine:
        pattern = SparsePattern(
            SINK_TOKENS,
            WINDOW_TOKENS,
            block_size,
            kind,
            full_decode_tokens=config["full_decode_tokens"],
            sparse_prefill=config["sparse_prefill"],
        )
        yield Served(engine, pattern, reference)


@pytest.fixture
def served(shared: Served) -> Served:
    shared.engine.reset()
    return shared


@pytest.mark.parametrize("step_tokens", [4096, 256, 97])
@pytest.mark.parametrize("lengths", [pytest.param(LENGTHS, id="short"), LONG])
def test_every_chunk_equals_the_reference(served: Served, step_tokens: int, lengths) -> None:
    """Prompt log-probabilities are asked for, so that nothing comes from the prefix cache."""
    served.engine.limit_steps(step_tokens)
    for length in lengths:
        # 100 decoded tokens cross a block edge; once is enough. What is decoded after chunks has
        # the keys that the prompt's own log-probabilities were computed with.
        tokens = 100 if (length, step_tokens) == (500, 4096) else 24 if step_tokens == 4096 else 8
        prompt = random_prompt(length, seed=length)
        (answer,) = served.engine.generate([prompt], tokens, prompt_logprobs=True)
        assert max(step[1] for step in answer.steps) == min(step_tokens, length)
        served.check(answer)


@pytest.mark.parametrize("lengths", [pytest.param([*LENGTHS, 17], id="short"), LONG])
def test_requests_in_one_batch(served: Served, lengths) -> None:
    prompts = [random_prompt(length, seed=10 + length) for length in lengths]
    served.engine.limit_steps(512)  # prompts in chunks run beside others' decodes
    answers = served.engine.generate(prompts, 24, prompt_logprobs=True)
    assert len({answer.steps[0][:2] for answer in answers}) > 1
    for answer in answers:
        served.check(answer)


# On a block's edge, one past it, and others.
@pytest.mark.parametrize("lengths", [pytest.param([160, 161, 257, 500, 1100], id="short"), LONG])
def test_prefix_cache_hit(served: Served, lengths) -> None:
    block_size = served.pattern.block_size
    for length in lengths:
        prompt = random_prompt(length, seed=20 + length)
        (first,) = served.engine.generate([prompt], 24)
        (second,) = served.engine.generate([prompt + random_prompt(190, seed=length)], 24)
        assert second.cached_tokens == length // block_size * block_size
        source = replay(served.reference, first, served.pattern, ROUTES).history
        served.check(second, source)


@pytest.mark.parametrize("skips_cache", [True, False], ids=["recompute", "cached"])
def test_preemption(served: Served, skips_cache: bool) -> None:
    """Text that is computed again lies past the prompt, where triangle's tail goes on."""
    prompts = [random_prompt(length, seed=30 + length) for length in (500, 161, 700, 1100)]
    # All prompts fit, their generations do not.
    blocks = sum(-(-len(prompt) // served.pattern.block_size) for prompt in prompts) + 2
    with served.engine.few_blocks(blocks):
        answers = served.engine.generate(prompts, 70, skip_reading_prefix_cache=skips_cache)
    resumed = [answer for answer in answers if answer.preemptions]
    assert resumed
    for answer in resumed:
        assert answer.resumed_at
        assert (max(answer.resumed_at) == 0) == skips_cache
    for answer in answers:
        served.check(answer)


def _changes(reference, kind: str, changed: SparsePattern | list[int]) -> float:
    """Give by how much another pattern or other routes move the log-probabilities at least."""
    prompt = random_prompt(1100, seed=1100)
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 32, kind)
    given = {"pattern": pattern, "routes": ROUTES}
    other = given | ({"routes": changed} if isinstance(changed, list) else {"pattern": changed})
    right, wrong = (reference.run(prompt, num_decode=4, **each) for each in (given, other))
    return (right.prompt_logprobs - wrong.prompt_logprobs)[1:].abs().max()


@pytest.mark.parametrize("layer", range(4))
def test_a_wrong_route_would_show(reference, layer: int) -> None:
    """The tolerance is tight enough: one route changed moves the log-probabilities."""
    wrong = [1 - route if at == layer else route for at, route in enumerate(ROUTES)]
    assert _changes(reference, "streaming", wrong) > 0.1


def test_prompts_under_their_routes_would_show(reference) -> None:
    changed = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 32, sparse_prefill=True)
    assert _changes(reference, "streaming", changed) > 0.1


@pytest.mark.parametrize("kind", ["triangle", "xattention"])
def test_streaming_in_its_place_would_show(reference, kind: str) -> None:
    assert _changes(reference, kind, SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 32)) > 0.1


def test_sparse_decode_in_its_place_would_show(reference) -> None:
    """An answer's first tokens, decoded with full attention, differ; its later ones follow."""
    prompt = random_prompt(500, seed=500)
    sizes = SINK_TOKENS, WINDOW_TOKENS, 32
    right, wrong = (
        reference.run(
            prompt,
            pattern=SparsePattern(*sizes, full_decode_tokens=n),
            routes=ROUTES,
            num_decode=12,
        )
        for n in (9, 0)
    )
    both = zip(right.output_logprobs, wrong.output_logprobs, strict=True)
    moved = [(a - b).abs().max() for a, b in both]
    assert moved[0] == 0  # the prompt's
    assert max(moved[1:]) > 0.1


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [
        ("float16", "bfloat16"),
        pytest.param("bfloat16", "float16", marks=pytest.mark.long),
    ],
)
def test_kv_cache_of_another_dtype(
    tiny_model, reference, dtype: str, cache: str, record_property: Callable[..., None]
) -> None:
    """vLLM's CPU kernels keep the model's dtype in it, so it is the same to the last bit.

    What low precision costs is told by policy `full`, which is vLLM's own answer.
    """
    prompts = [random_prompt(length, seed=length) for length in (161, 500, 1100)]

    def answers(flux, kv_cache_dtype):
        arguments = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "block_size": 32}
        with Engine(tiny_model, flux, max_num_batched_tokens=256, **arguments) as engine:
            return engine.generate(prompts, 16, prompt_logprobs=True)

    worst = {}
    for config, other, routes in (
        (flux(), (flux(), "auto"), ROUTES),
        ({"policy": "full"}, (None, cache), [FULL] * 4),
    ):
        errors = []
        for answer, same in zip(answers(config, cache), answers(*other), strict=True):
            assert answer.tokens == same.tokens
            assert answer.logprobs == same.logprobs
            assert answer.prompt_logprobs == same.prompt_logprobs
            pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 32)
            request = replay(reference, answer, pattern, routes, follow_tokens=True)
            errors += logprob_errors(answer, request)
        worst[config["policy"]] = max(errors)
        record_property(f"worst_logprob_error_{config['policy']}", max(errors))
    assert worst["static"] < 2 * worst["full"]
