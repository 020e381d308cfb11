"""`free_kv` on a GPU: several KV cache groups, freed and overwritten, change no bit.

Oracle: the same engine without `free_kv`, given the same chunks; for memory, the formula of
docs/KV_MEMORY.md. CUDA graphs and asynchronous scheduling are on, as by vLLM's defaults.
"""

from dataclasses import replace

import pytest

from flux_vllm.router.checkpoint import read_router, write_router
from tests.helpers.engine import Engine
from tests.helpers.free_kv import PoisonedEngine, given_back
from tests.helpers.models import random_prompt, write_bfloat16_llama

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE, TOKENS, EARLY = 32, 128, 32, 70, 40
PATTERN = {"sink_tokens": SINK_TOKENS, "window_tokens": WINDOW_TOKENS}
SIZES = PATTERN | {"block_size": BLOCK_SIZE}
STATIC = PATTERN | {"policy": "static", "sparse_layers": [0, 1, 2]}
LENGTHS = [1510, 710, 655, 159, 30]
PROMPTS = [random_prompt(length, seed=length) for length in LENGTHS]
ARGUMENTS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "max_num_seqs": 16,
    "block_size": BLOCK_SIZE,
    "max_num_batched_tokens": 512,
    "enable_prefix_caching": True,
    # Engines of different flux configurations compile apart, and Inductor times its combined
    # kernels to choose among them: sums of another order would differ in their last bits.
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny bfloat16 Llama, and a router that gives these prompts routes of their own."""
    folder, router = write_bfloat16_llama(
        tmp_path_factory.mktemp("tiny"),
        head_dim=128,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
    )
    found, info = read_router(router)
    write_router(router, found, replace(info, freeing_order=(2, 0, 3, 1)))
    return folder, {"router": str(router)}


def _assert_same(answers, others, what):
    """Hold two engines' answers to each other, to the bit."""
    for answer, other in zip(answers, others, strict=True):
        length = len(answer.prompt)
        assert answer.routes == other.routes, f"{what}: routes of the prompt of {length} tokens"
        assert answer.cached_tokens == other.cached_tokens, f"{what}: hits of {length} tokens"
        pairs = list(zip(answer.logprobs, other.logprobs, strict=True))
        apart = [index for index, (one, two) in enumerate(pairs) if one != two]
        worst = max(abs(one - two) for one, two in pairs)
        assert answer.tokens == other.tokens, (
            f"{what}: {length} tokens, log-probabilities differ from output {apart[:1]} on, by "
            f"{worst:.4f} at most; steps {answer.steps == other.steps}"
        )
        assert not apart, f"{what}: {length} tokens, outputs {apart[:5]} differ by {worst:.6f}"


def _serve(make, folder, flux):
    """Answer the prompts together, then, one by one, questions that follow the first answers."""
    with make(folder, flux, **ARGUMENTS) as engine:
        answers = engine.generate(PROMPTS, TOKENS)
        held = None
        if isinstance(engine, PoisonedEngine):
            assert engine.core.batch_queue_size == 2, "scheduled ahead"
            held = len(engine.managers), len(engine.freed)
        longer = [a.prompt + a.tokens + random_prompt(20, seed=1) for a in answers[:2]]
        followed = [engine.generate([prompt], TOKENS)[0] for prompt in longer]
        if isinstance(engine, PoisonedEngine):
            pool = engine.manager.block_pool
            assert pool.get_num_free_blocks() == len(pool.blocks) - 1
        return answers, followed, held


@pytest.mark.parametrize(
    ("case", "early"),
    [
        ("streaming-fa3", 0),
        ("triangle-triton", 0),
        ("streaming-triton", EARLY),
        ("triangle-fa3", EARLY),
    ],
)
def test_static_clusters(model, case, early):
    pattern, kernels = case.split("-")
    flux = STATIC | {"sparse_pattern": pattern, "kernels": kernels, "full_decode_tokens": early}
    answers, followed, held = _serve(PoisonedEngine, model[0], flux | {"free_kv": True})
    assert held == (4, given_back(answers, routes=[0, 0, 0, 1], **SIZES))
    plain, plain_followed, _ = _serve(Engine, model[0], flux)
    _assert_same(answers, plain, "prompts")
    _assert_same(followed, plain_followed, "follow-ups")


@pytest.mark.parametrize("early", [0, EARLY])
def test_routed_clusters(model, early):
    folder, flux = model
    flux = flux | {"full_decode_tokens": early}
    answers, followed, held = _serve(PoisonedEngine, folder, flux | {"free_kv": True})
    assert held == (4, given_back(answers, **SIZES))
    assert len({tuple(answer.routes) for answer in answers if answer.routes}) > 1
    plain, plain_followed, _ = _serve(Engine, folder, flux)
    _assert_same(answers, plain, "prompts")
    _assert_same(followed, plain_followed, "follow-ups")


@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
def test_nothing_is_given_back_within_an_answers_first_tokens(model, pattern):
    flux = STATIC | {"sparse_pattern": pattern, "full_decode_tokens": EARLY, "free_kv": True}
    with PoisonedEngine(model[0], flux, **ARGUMENTS) as engine:
        engine.generate(PROMPTS, EARLY + 1)
        assert not engine.freed


def test_few_blocks(model):
    """Requests wait, some are preempted: each is answered, and every block is free at the end."""
    folder, flux = model
    prompts = [random_prompt(600 + length, seed=length) for length in range(8)]
    blocks = 4 * 32 + 1
    arguments = ARGUMENTS | {"max_model_len": 1024, "num_gpu_blocks_override": blocks}
    with PoisonedEngine(folder, flux | {"free_kv": True}, **arguments) as engine:
        answers = engine.generate(prompts, 200)
        assert engine.most_running > 1
        pool = engine.manager.block_pool
        assert pool.get_num_free_blocks() == len(pool.blocks) - 1 == blocks - 1
        alone = [engine.generate([prompt], 1)[0] for prompt in prompts]
    for answer, other in zip(answers, alone, strict=True):
        assert len(answer.tokens) == 200
        assert answer.routes == other.routes
        # Another batch, other sums in bfloat16.
        likeliest = max(other.candidates[0].values())
        assert answer.candidates[0][answer.tokens[0]] == pytest.approx(likeliest, abs=0.1)
