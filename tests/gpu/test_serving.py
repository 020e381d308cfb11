"""The CUDA backend in a real engine, against transformers in float32.

Oracle: tests/helpers/reference.py over the same bfloat16 weights. An engine in bfloat16 cannot
equal it, so the rule is: at most twice the error that vLLM's own FLASH_ATTN makes on the same
prompts against the same reference with all layers FULL. vLLM's defaults stay on (CUDA graphs,
asynchronous scheduling) unless a test says otherwise.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_vllm.router.checkpoint import ROUTER_FILE_NAME
from tests.helpers.engine import Engine
from tests.helpers.metrics import parse, total
from tests.helpers.models import random_prompt, write_random_router, write_tiny_llama
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import logprob_errors, replay

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
DEFAULTS = {"dtype": "bfloat16", "enforce_eager": False, "max_num_seqs": 16}


@pytest.fixture(scope="session", params=[64, 128], ids=["H64", "H128"])
def model(request, tmp_path_factory):
    """A tiny bfloat16 Llama with a fitted router in a folder of its own."""
    folder = write_tiny_llama(
        tmp_path_factory.mktemp("tiny"), heads=8, kv_heads=2, head_dim=request.param
    )
    weights = folder / "model.safetensors"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(halved, weights, {"format": "pt"})
    router = folder.parent / f"router-{request.param}"
    router.mkdir()
    write_random_router(
        router,
        num_layers=4,
        head_dim=request.param,
        pool_tokens=48,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=folder,
    )
    return folder, router, ReferenceModel(folder)


@pytest.fixture(scope="session")
def flash_attn_error(model):
    """Largest errors of FLASH_ATTN's prompt and output log-probabilities on these prompts."""
    folder, _, reference = model
    with Engine(folder, None, attention_backend="FLASH_ATTN", **DEFAULTS) as engine:
        answers = [
            engine.generate([random_prompt(n, seed=n)], 24, prompt_logprobs=True)[0]
            for n in LENGTHS
        ]
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 16)
    errors = [
        logprob_errors(answer, replay(reference, answer, pattern, [FULL] * 4, follow_tokens=True))
        for answer in answers
    ]
    return tuple(max(column) for column in zip(*errors, strict=True))


def _check(answers, model, allowed, block_size=16, routed=True):
    folder, router, reference = model
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, block_size)
    worst = (0.0, 0.0)
    for answer in answers:
        request = replay(
            reference,
            answer,
            pattern,
            routes=None if routed else ROUTES,
            router=ReferenceRouter.load(router / ROUTER_FILE_NAME) if routed else None,
            margin=P_FULL_MARGIN,
            follow_tokens=True,
        )
        worst = tuple(map(max, worst, logprob_errors(answer, request)))
    print(f"\nworst prompt, output error {worst}, FLASH_ATTN {allowed}", flush=True)
    assert worst[0] <= 2 * allowed[0]
    assert worst[1] <= 2 * allowed[1]


@pytest.mark.parametrize("kernels", ["fa3", "triton"])
@pytest.mark.parametrize("chunk", [4096, 97], ids=["one-chunk", "chunks-97"])
def test_static(model, flash_attn_error, kernels, chunk):
    flux = STATIC | {"kernels": kernels}
    with Engine(model[0], flux, max_num_batched_tokens=chunk, **DEFAULTS) as engine:
        answers = [
            engine.generate([random_prompt(n, seed=n)], 24, prompt_logprobs=True)[0]
            for n in LENGTHS
        ]
    _check(answers, model, flash_attn_error, routed=False)


@pytest.mark.parametrize("kernels", ["fa3", "triton"])
@pytest.mark.parametrize("chunk", [4096, 128], ids=["one-chunk", "chunks-128"])
def test_router_in_a_batch(model, flash_attn_error, kernels, chunk):
    """Mixed routes and phases in one batch; prompts of 129 and 257 leave one-token tails."""
    flux = {"router": str(model[1]), "kernels": kernels}
    with Engine(
        model[0], flux, max_num_batched_tokens=chunk, served_model_name="batch", **DEFAULTS
    ) as engine:
        answers = engine.generate(
            [random_prompt(n, seed=n) for n in [*LENGTHS, 129, 257]], 40, prompt_logprobs=True
        )
        assert engine.worker.flux_status()["live_requests"] >= 0
        from prometheus_client import generate_latest

        metrics = parse(generate_latest().decode())
    assert total(metrics, "flux_unrouted_rows_total", model_name="batch") == 0
    assert len({tuple(answer.routes) for answer in answers}) > 3
    _check(answers, model, flash_attn_error)


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_preemption_and_block_sizes(model, flash_attn_error, block_size):
    prompts = [random_prompt(n, seed=60 + n) for n in (500, 161, 700, 1100)]
    blocks = sum(-(-len(prompt) // block_size) for prompt in prompts) + 5
    bytes_per_block = 4 * 2 * 2 * model[2].head_dim * 2 * block_size
    with Engine(
        model[0],
        {"router": str(model[1])},
        block_size=block_size,
        max_model_len=2048,
        kv_cache_memory_bytes=blocks * bytes_per_block + (400 << 20),
        num_gpu_blocks_override=blocks,
        **DEFAULTS,
    ) as engine:
        answers = engine.generate(prompts, 200)
    assert sum(answer.preemptions for answer in answers) > 0
    allowed = (flash_attn_error[0], 1.5 * flash_attn_error[1])  # eight times the tokens
    _check(answers, model, allowed, block_size)


def test_graphs_equal_eager(model):
    """Replays of one graph under changing routes equal eager steps."""
    prompts = [random_prompt(n, seed=n) for n in (200, 900, 40, 400, 1500)]
    answers = []
    for eager in (True, False):
        with Engine(
            model[0], {"router": str(model[1])}, **(DEFAULTS | {"enforce_eager": eager})
        ) as engine:
            answers.append([engine.generate([prompt], 32)[0] for prompt in prompts])
    for eager, graph in zip(*answers, strict=True):
        assert eager.routes == graph.routes
        # Splits of the keys differ between the two, so the last bits do.
        same = [a == b for a, b in zip(eager.tokens, graph.tokens, strict=True)]
        until = same.index(False) if False in same else len(same)
        for a, b in zip(eager.logprobs[:until], graph.logprobs[:until], strict=True):
            assert abs(a - b) < 0.2
        assert until > 0


def test_full_policy_equals_flash_attn(model):
    prompts = [random_prompt(n, seed=n) for n in (1, 33, 161, 500, 900, 2500)]
    answers = []
    for arguments in ({"attention_backend": "FLASH_ATTN"}, {}):
        flux = None if arguments else {"policy": "full"}
        with Engine(model[0], flux, **(DEFAULTS | arguments)) as engine:
            answers.append([engine.generate([prompt], 64)[0] for prompt in prompts])
    for stock, ours in zip(*answers, strict=True):
        assert stock.tokens == ours.tokens


def test_gpu_is_there():
    assert torch.cuda.is_available()
