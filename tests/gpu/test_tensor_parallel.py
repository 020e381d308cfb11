"""Tensor parallel 2: both ranks take the same routes, those of one GPU, and answer as it does.

Oracles: the other rank, bit by bit; the engine on one GPU wherever its P(FULL) is clear of the
threshold; tests/helpers/reference.py in float32, by the rule of test_serving.py (at most twice the
error that FLASH_ATTN makes on one GPU). vLLM's defaults stay on (CUDA graphs, asynchronous
scheduling). Where routes differ near the threshold, the two answers to the prompt come of other
attention and are not compared with each other, only with the reference, which follows the routes
taken; how many there are is printed.

The 8B shape is too large for the reference: there FLASH_ATTN on two GPUs against FLASH_ATTN on one
is what bfloat16 explains. Its widths are real and its layers are fewer.

A test's engines start side by side and hold their memory together: with the 8B shape, by estimate,
27 GB of the first GPU and 11 of the second.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.helpers.models import random_prompt, write_bfloat16_llama, write_random_router
from tests.helpers.reference import FULL, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import logprob_errors, replay
from tests.helpers.side_by_side import Served, Setup, serve_side_by_side
from tests.helpers.tensor_parallel import assert_ranks_alike, compare_routes, logprob_difference
from tests.helpers.wide_model import write_fitted_router, write_wide_llama

GPUS = torch.cuda.device_count()
# A folder whose config.json is Llama 3.1 8B's.
SHAPE = Path(
    os.environ.get("FLUX_TEST_8B_SHAPE", REPOSITORY / "benchmarks" / "shapes" / "llama-3.1-8b")
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA GPUs; {GPUS} are visible here"),
]

SINK_TOKENS, WINDOW_TOKENS = 32, 128
BLOCK_SIZE = 16
LENGTHS = [1, 15, 16, 17, 129, 160, 161, 320, 500, 1100, 2050, 3000]
OUTPUT = 24
P_FULL_MARGIN = 0.1  # bfloat16 queries against float32
# Standard deviation of the logits' difference over the prompts a router is fitted to. The routes it
# takes do not depend on it, only how far P(FULL) is from the threshold: bfloat16 alone must not
# move it by 0.01 near there (on a CPU it does by 0.012 at worst with 1.0, of a prompt anywhere).
GAIN, WIDE_GAIN = 0.5, 0.4
WIDE_LAYERS = 8
BASELINE = "FLASH_ATTN"
DEFAULTS = {
    "dtype": "bfloat16",
    "block_size": BLOCK_SIZE,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 1 << 30,  # all prompts at once, in either shape
    "gpu_memory_utilization": 0.15,  # several processes share the GPUs
}
GRAPHS, EAGER = {"enforce_eager": False}, {"enforce_eager": True}


def _setup(model: Path, router: Path | None, ranks: int) -> Setup:
    """Describe an engine with flux and graphs, or with FLASH_ATTN and neither."""
    if router is None:
        return Setup(model, None, ranks, DEFAULTS | EAGER | {"attention_backend": BASELINE})
    return Setup(model, {"router": str(router)}, ranks, DEFAULTS | GRAPHS)


def _serve(setups: list[Setup], vocab_size: int = 512) -> list[Served]:
    prompts = [random_prompt(length, length, vocab_size) for length in LENGTHS]
    return serve_side_by_side(setups, prompts, OUTPUT)


def _check_routes(one: Served, two: Served) -> set[int]:
    """Hold ranks to each other and two GPUs to one. Returns: prompts whose routes differ."""
    assert len(two.logs) == 2
    for served in (one, two):
        print(f"\n{assert_ranks_alike(served.logs)}", flush=True)
        assert served.unrouted == 0
    found = compare_routes(one.answers, two.answers)
    print(f"two GPUs against one: {found}", flush=True)
    routed = [answer.routes for answer in two.answers if answer.routes is not None]
    decided = len(routed) * len(routed[0])
    assert found.compared > decided / 2, "too few decisions clear of the threshold"
    assert len(set(map(tuple, routed))) > 3
    assert len(found.parted) <= len(LENGTHS) / 2, "too few prompts under the same routes"
    return found.parted


def _print_difference(what: str, difference: tuple[float, float, int], parted: set[int]) -> None:
    prompt, output, tokens = difference
    print(
        f"{what}: worst log-probability difference, prompt {prompt:.4f}, output {output:.4f} over "
        f"{tokens} tokens; prompts not compared, as their routes differ: {len(parted)}",
        flush=True,
    )


@pytest.fixture(scope="module", params=[64, 128], ids=["H64", "H128"])
def tiny(request, tmp_path_factory):
    """A tiny bfloat16 Llama of 8 query and 2 KV heads, its fitted router, its reference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    folder, router = write_bfloat16_llama(
        tmp_path_factory.mktemp("tiny"),
        head_dim=request.param,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        gain=GAIN,
    )
    yield folder, router, ReferenceModel(folder)
    torch.set_num_threads(threads)


def _worst_errors(answers, reference, router) -> tuple[float, float]:
    """Give the worst errors of prompt and output log-probabilities; no router: all are FULL."""
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
    errors = [
        logprob_errors(
            answer,
            replay(
                reference,
                answer,
                pattern,
                routes=[FULL] * 4 if router is None else None,
                router=router,
                margin=P_FULL_MARGIN,
                follow_tokens=True,
            ),
        )
        for answer in answers
    ]
    return tuple(max(column) for column in zip(*errors, strict=True))


def test_small_model(tiny):
    folder, router_folder, reference = tiny
    router = ReferenceRouter.load(router_folder)
    setups = [(router_folder, 1), (router_folder, 2), (None, 1)]
    one, two, plain = _serve([_setup(folder, *setup) for setup in setups])
    parted = _check_routes(one, two)
    difference = logprob_difference(one.answers, two.answers, parted)
    _print_difference("flux on two GPUs against one", difference, parted)
    allowed = _worst_errors(plain.answers, reference, None)
    errors = {
        ranks: _worst_errors(s.answers, reference, router) for ranks, s in ((1, one), (2, two))
    }
    print(f"worst prompt, output error by GPUs {errors}, {BASELINE} on one {allowed}", flush=True)
    for worst in errors.values():
        assert worst[0] <= 2 * allowed[0]
        assert worst[1] <= 2 * allowed[1]
    # Each may err by twice the error of FLASH_ATTN.
    assert difference[0] <= 4 * allowed[0]
    assert difference[1] <= 4 * allowed[1]
    assert difference[2] >= OUTPUT, "too few tokens alike to say anything"


def test_probe_that_ends_early(tiny, tmp_path):
    """Both ranks leave the model at the same layer, before it adds up what they computed."""
    folder, trained, _ = tiny
    router = write_random_router(
        tmp_path,
        num_layers=4,
        head_dim=int(ReferenceRouter.load(trained).metadata["head_dim"]),
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=folder,
        pools=("tail:48", "head:48"),
        context_layers=(1,),
        own_weight=0,
        gain=GAIN,
    ).parent
    _check_routes(*_serve([_setup(folder, router, ranks) for ranks in (1, 2)]))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A random model of the 8B shape's widths, its fitted router, its vocabulary's size."""
    folder = write_wide_llama(tmp_path_factory.mktemp("wide"), SHAPE, WIDE_LAYERS)
    router = tmp_path_factory.mktemp("router")
    write_fitted_router(
        router,
        folder,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        gain=WIDE_GAIN,
    )
    torch.cuda.empty_cache()
    yield folder, router, json.loads((folder / "config.json").read_text())["vocab_size"]
    shutil.rmtree(folder)  # 6 GB


def test_8b_widths(wide):
    folder, router, vocab_size = wide
    setups = [(router, 1), (router, 2), (None, 1), (None, 2)]
    one, two, *plain = _serve([_setup(folder, *setup) for setup in setups], vocab_size)
    parted = _check_routes(one, two)
    difference = logprob_difference(one.answers, two.answers, parted)
    _print_difference("flux on two GPUs against one", difference, parted)
    noise = logprob_difference(*(served.answers for served in plain))
    _print_difference(f"{BASELINE} on two GPUs against one", noise, set())
    assert difference[0] <= 2 * noise[0]
    assert difference[2] >= OUTPUT, "too few tokens alike to say anything"
    # Outputs are few; a prompt's tokens, of the same model, err as much.
    assert difference[1] <= 2 * max(noise[:2])
