"""The CUDA backend in a real engine, against transformers in float32.

Oracle: tests/helpers/reference.py over the same bfloat16 weights. An engine in bfloat16 cannot
equal it, so the rule is: at most twice the error that vLLM's own FLASH_ATTN makes on the same
prompts against the same reference with all layers FULL. vLLM's defaults stay on (CUDA graphs,
asynchronous scheduling) unless a test says otherwise. Starting engines is what takes the time: each
serves several tests, prompts of one chunk and of many.
"""

from dataclasses import dataclass
from unittest.mock import patch

import pytest

from flux_vllm.router.place import ROUTER_FILE_NAME
from tests.helpers.close_choices import assert_chosen_as_exactly
from tests.helpers.engine import Answer, Engine
from tests.helpers.metrics import parse, total
from tests.helpers.models import random_prompt, write_bfloat16_llama, write_random_router
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import (
    assert_likeliest,
    assert_verified_drafts,
    logprob_errors,
    replay,
)

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

SINK_TOKENS, WINDOW_TOKENS = 32, 128
ROUTES = [SPARSE, FULL, SPARSE, FULL]
STATIC = {
    "policy": "static",
    "sparse_layers": [0, 2],
    "sink_tokens": SINK_TOKENS,
    "window_tokens": WINDOW_TOKENS,
}
LENGTHS = [1, 15, 16, 17, 159, 160, 161, 320, 500, 1100, 3001]
P_FULL_MARGIN = 0.1  # bfloat16 queries
CHUNK = 128  # prompts of 129 and 257 tokens leave a tail of one
TAILS = [129, 257]
# A step must hold a probe's 256 tokens.
CHUNKED = {"max_num_batched_tokens": 256, "long_prefill_token_threshold": CHUNK}
ALONE = [200, 900, 40, 400, 1500]
TRIO = [300, 160, 1000]
OUTPUT = 24
ALLOWED = [3, 77, 400]
DEFAULTS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "max_num_seqs": 16,
}


def _prompts(lengths):
    return [random_prompt(length, seed=length) for length in lengths]


@pytest.fixture(scope="session", params=[64, 128], ids=["H64", "H128"])
def model(request, tmp_path_factory):
    """A tiny bfloat16 Llama with a fitted router in a folder of its own."""
    folder, router = write_bfloat16_llama(
        tmp_path_factory.mktemp("tiny"),
        head_dim=request.param,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
    )
    return folder, router, ReferenceModel(folder)


@pytest.fixture(scope="session")
def flash_attn_error(model):
    """Largest errors of FLASH_ATTN's prompt and output log-probabilities on these prompts."""
    folder, _, reference = model
    with Engine(folder, None, attention_backend="FLASH_ATTN", **DEFAULTS) as engine:
        answers = [
            engine.generate([prompt], OUTPUT, prompt_logprobs=True)[0]
            for prompt in _prompts(LENGTHS)
        ]
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 16)
    errors = [
        logprob_errors(answer, replay(reference, answer, pattern, [FULL] * 4, follow_tokens=True))
        for answer in answers
    ]
    return tuple(max(column) for column in zip(*errors, strict=True))


def _check(
    answers, model, allowed, block_size=16, routed=True, sources=None, kind="streaming", **phases
):
    """Hold answers to twice the allowed errors. Returns: their replays.

    Of each answer `sources` has the replay whose blocks it may have found in the prefix cache.
    """
    folder, router, reference = model
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, block_size, kind, **phases)
    worst, requests = (0.0, 0.0), []
    for answer, source in zip(answers, sources or [None] * len(answers), strict=True):
        request = replay(
            reference,
            answer,
            pattern,
            routes=None if routed else ROUTES,
            router=ReferenceRouter.load(router / ROUTER_FILE_NAME) if routed else None,
            history=source and source.history,
            margin=P_FULL_MARGIN,
            follow_tokens=True,
        )
        requests.append(request)
        worst = tuple(map(max, worst, logprob_errors(answer, request)))
    print(f"\nworst prompt, output error {worst}, FLASH_ATTN {allowed}", flush=True)
    assert worst[0] <= 2 * allowed[0]
    assert worst[1] <= 2 * allowed[1]
    return requests


def test_static(model, flash_attn_error):
    """Prompts up to 331 tokens in one chunk, longer ones in several at odd offsets."""
    arguments = DEFAULTS | {"enforce_eager": True}
    with Engine(model[0], STATIC, max_num_batched_tokens=331, **arguments) as engine:
        answers = [
            engine.generate([prompt], OUTPUT, prompt_logprobs=True)[0]
            for prompt in _prompts(LENGTHS)
        ]
    _check(answers, model, flash_attn_error, routed=False)


@dataclass
class Served:
    """What one engine with a router, graphs and small chunks answered.

    Attributes:
        batch: many prompts at once.
        tails: prompts with one-token tails, each alone.
        forwards: of each tail prompt, how often a layer's attention ran in Python.
        alone: prompts one by one.
        trio: three prompts at once: a graph of four rows.
        trio_alone: the same one by one.
    """

    batch: list[Answer]
    tails: list[Answer]
    forwards: list[int]
    alone: list[Answer]
    trio: list[Answer]
    trio_alone: list[Answer]


def _one_by_one(engine, lengths):
    return [engine.generate([prompt], OUTPUT)[0] for prompt in _prompts(lengths)]


@pytest.fixture(scope="session", params=["fa3", "triton"])
def served(request, model):
    from prometheus_client import generate_latest

    from flux_vllm.attention_backend.cuda.backend import FluxCUDAImpl

    flux = {"router": str(model[1]), "kernels": request.param}
    name = f"{request.param}-{model[2].head_dim}"
    with Engine(model[0], flux, served_model_name=name, **CHUNKED, **DEFAULTS) as engine:
        batch = engine.generate(_prompts([*LENGTHS, *TAILS]), 40, prompt_logprobs=True)
        tails, forwards = [], []
        forward = FluxCUDAImpl.forward
        for prompt in _prompts(TAILS):
            with patch.object(FluxCUDAImpl, "forward", autospec=True, side_effect=forward) as spy:
                tails += engine.generate([prompt], OUTPUT)
            forwards.append(spy.call_count)
        answers = (
            _one_by_one(engine, ALONE),
            engine.generate(_prompts(TRIO), OUTPUT),
            _one_by_one(engine, TRIO),
        )
        metrics = parse(generate_latest().decode())
    unrouted = total(metrics, "flux_unrouted_rows_total", model_name=name)
    assert unrouted == 0
    return Served(batch, tails, forwards, *answers)


def test_router_in_a_batch(model, flash_attn_error, served):
    """Mixed routes and phases in one batch."""
    assert len({tuple(answer.routes or ()) for answer in served.batch}) > 3
    _check(served.batch, model, flash_attn_error)


def test_one_token_tail_is_no_graph_replay(model, flash_attn_error, served):
    """Python runs each layer at each prefill step, tails included, and at no decode step."""
    for answer, forwards in zip(served.tails, served.forwards, strict=True):
        prefills = [length for _, length, phase in answer.steps if phase == "prefill"]
        assert prefills[-1] == 1
        assert forwards == 4 * len(prefills), f"{answer.steps}: {forwards} forwards"
    _check(served.tails, model, flash_attn_error)


def test_padded_graph(model, flash_attn_error, served):
    """Three rows in the graph of four, and each in a graph of its own.

    Both against the reference: three prompts at once are cut into other chunks than one.
    """
    _check(served.trio, model, flash_attn_error)
    _check(served.trio_alone, model, flash_attn_error)


@pytest.fixture(scope="session")
def eager(model):
    """The answers to `Served.alone` without graphs."""
    arguments = DEFAULTS | {"enforce_eager": True}
    with Engine(model[0], {"router": str(model[1])}, **CHUNKED, **arguments) as engine:
        return _one_by_one(engine, ALONE)


def test_graphs_equal_eager(model, flash_attn_error, served, eager):
    """Replays of one graph under changing routes equal eager steps, of either kernels."""
    requests = _check(served.alone, model, flash_attn_error)
    _assert_alike(served.alone, eager, flash_attn_error, requests)
    _check(eager, model, flash_attn_error)


def _assert_alike(answers, others, allowed, requests):
    """Hold two computations to each other: each may err by twice FLASH_ATTN's error.

    They part ways at near ties, of which a random model has many: there the reference, which
    replayed the first (`requests`), must find both tokens as likely within the same errors.
    """
    compared = 0
    for one, other, request in zip(answers, others, requests, strict=True):
        assert one.routes == other.routes
        same = [a == b for a, b in zip(one.tokens, other.tokens, strict=True)]
        until = same.index(False) if False in same else len(same)
        compared += until
        for a, b in zip(one.logprobs[:until], other.logprobs[:until], strict=True):
            assert abs(a - b) <= 4 * allowed[1]
        if until < len(same):
            row = request.output_logprobs[until]
            assert abs(row[one.tokens[until]] - row[other.tokens[until]]) <= 4 * allowed[1]
    assert compared >= OUTPUT, "too few tokens alike to say anything"


def test_preemption_and_block_sizes(model, flash_attn_error):
    """Blocks of as many tokens as head_dim: 64 and 128; all prompts fit one chunk."""
    prompts = [random_prompt(n, seed=60 + n) for n in (500, 161, 700, 1100)]
    block_size = model[2].head_dim
    blocks = sum(-(-len(prompt) // block_size) for prompt in prompts) + 5
    bytes_per_block = 4 * 2 * 2 * model[2].head_dim * 2 * block_size
    with Engine(
        model[0],
        {"router": str(model[1])},
        block_size=block_size,
        max_model_len=2048,
        kv_cache_memory_bytes=blocks * bytes_per_block + (400 << 20),
        num_gpu_blocks_override=blocks,
        **(DEFAULTS | {"enforce_eager": True}),
    ) as engine:
        answers = engine.generate(prompts, 200)
    assert sum(answer.preemptions for answer in answers) > 0
    allowed = (flash_attn_error[0], 1.5 * flash_attn_error[1])  # eight times the tokens
    _check(answers, model, allowed, block_size)


def test_prefix_caching(model, flash_attn_error):
    """Prompts asked again, and one that begins as another did: they read blocks of others.

    Prompt log-probabilities are not asked for: vLLM computes such prompts anew.
    """
    prompts = _prompts([161, 500, 1100, 3001])
    sharing = prompts[2][:700] + random_prompt(333, seed=7)
    arguments = DEFAULTS | {"enable_prefix_caching": True}
    with Engine(model[0], {"router": str(model[1])}, **arguments) as engine:
        first = engine.generate(prompts, OUTPUT)
        again = engine.generate([*prompts, sharing], OUTPUT)
    assert [answer.cached_tokens for answer in first] == [0] * len(prompts)
    # In whole blocks, and the last prompt token is computed each time.
    assert [answer.cached_tokens for answer in again] == [160, 496, 1088, 3000 // 16 * 16, 688]
    sources = _check(first, model, flash_attn_error)
    sources.append(sources[2])
    requests = _check(again, model, flash_attn_error, sources=sources)
    assert [answer.routes for answer in again] == [request.routes for request in requests]
    assert len({tuple(answer.routes or ()) for answer in again}) > 1


def test_router_of_the_latest_tokens_alone(model, flash_attn_error, tmp_path):
    """Chunks with graphs."""
    folder, _, reference = model
    router = write_random_router(
        tmp_path,
        num_layers=4,
        head_dim=reference.head_dim,
        pool_tokens=16,
        pool_prefix=False,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=folder,
    )
    with Engine(folder, {"router": str(router)}, **CHUNKED, **DEFAULTS) as engine:
        answers = engine.generate(_prompts([*LENGTHS, *TAILS]), 40, prompt_logprobs=True)
    assert len({tuple(answer.routes or ()) for answer in answers}) > 3
    _check(answers, (folder, tmp_path, reference), flash_attn_error)


@pytest.mark.parametrize("case", ["triangle-fa3", "xattention-fa3", "xattention-triton"])
def test_other_patterns(model, flash_attn_error, case):
    """Prompts in chunks at odd offsets beside others' decodes, with graphs."""
    kind, kernels = case.split("-")
    flux = STATIC | {"sparse_pattern": kind, "kernels": kernels}
    memory = 2 << 30  # XAttention's workspace comes out of the KV cache's
    with Engine(
        model[0], flux, max_num_batched_tokens=331, kv_cache_memory_bytes=memory, **DEFAULTS
    ) as engine:
        answers = engine.generate(_prompts(LENGTHS), OUTPUT, prompt_logprobs=True)
    if kind == "xattention":
        pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 16, kind)
        assert_chosen_as_exactly(answers, model[0], model[2], pattern, ROUTES, flash_attn_error)
    else:
        _check(answers, model, flash_attn_error, routed=False, kind=kind)


@pytest.mark.parametrize("kernels", ["fa3", "triton"])
def test_router_under_triangle(model, flash_attn_error, kernels):
    """What ships: mixed routes in one batch, whose prompts' last queries see everything."""
    flux = {"router": str(model[1]), "sparse_pattern": "triangle", "kernels": kernels}
    with Engine(model[0], flux, **CHUNKED, **DEFAULTS) as engine:
        answers = engine.generate(_prompts([*LENGTHS, *TAILS]), 40, prompt_logprobs=True)
    assert len({tuple(answer.routes or ()) for answer in answers}) > 3
    _check(answers, model, flash_attn_error, kind="triangle")


@pytest.mark.parametrize("kernels", ["fa3", "triton"])
@pytest.mark.parametrize("policy", ["static", "router"])
def test_prompt_and_answer_apart(model, flash_attn_error, policy, kernels):
    """Prompts under SPARSE in every layer, SPARSE decode from an answer's tenth token on."""
    phases = {"full_decode_tokens": 9, "sparse_prefill": True}
    flux = STATIC if policy == "static" else {"router": str(model[1])}
    flux = flux | {"sparse_pattern": "triangle", "kernels": kernels} | phases
    with Engine(model[0], flux, **CHUNKED, **DEFAULTS) as engine:
        answers = engine.generate(_prompts([*LENGTHS, *TAILS]), OUTPUT, prompt_logprobs=True)
    routed = policy == "router"
    _check(answers, model, flash_attn_error, routed=routed, kind="triangle", **phases)


@pytest.mark.parametrize("case", ["static-fa3", "router-triton"])
def test_speculative_decoding(model, flash_attn_error, case):
    """Rows of several queries in graphs; three allowed tokens make n-grams foretell the output."""
    policy, kernels = case.split("-")
    flux = (STATIC if policy == "static" else {"router": str(model[1])}) | {"kernels": kernels}
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    arguments = DEFAULTS | {"max_num_seqs": 8}
    with Engine(
        model[0], flux, max_num_batched_tokens=512, speculative_config=ngram, **arguments
    ) as engine:
        answers = engine.generate(_prompts([30, 185, 700, 2000]), 60, allowed_token_ids=ALLOWED)
        answers += engine.generate(_prompts([320]), 60, allowed_token_ids=ALLOWED)
    assert_verified_drafts(answers)
    # The allowed tokens are as unlikely as a random prompt's.
    allowed = (flash_attn_error[0], max(flash_attn_error))
    for answer, request in zip(
        answers, _check(answers, model, allowed, routed=policy == "router"), strict=True
    ):
        assert_likeliest(answer, request, ALLOWED, tolerance=4 * allowed[1])
