"""Drafters with layers of their own on a GPU: V2's runner, CUDA graphs, asynchronous scheduling.

Oracle: tests/helpers/reference.py over the same bfloat16 weights, by the rule of test_serving.py:
at most twice the error that vLLM's own FLASH_ATTN makes, all layers FULL. Without a drafter: one
engine then serves all drafters of a model.
"""

from functools import cache

import pytest

from flux_vllm.router.place import ROUTER_FILE_NAME
from tests.helpers.drafters import HEAD_DIM, LAYERS, VOCABULARY, write_drafter, write_target
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt, round_to_bfloat16, write_random_router
from tests.helpers.reference import FULL, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import assert_verified_drafts, logprob_errors, replay

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

SIZES = {"sink_tokens": 32, "window_tokens": 128}
PATTERN = SparsePattern(32, 128, 16)
DEFAULTS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
}


def _answers(model, flux, **arguments):
    """Answer a batch and a prompt alone; returns the layers' backends too."""
    prompts = [random_prompt(n, n, VOCABULARY) for n in (30, 185, 700, 2000)]
    with Engine(model, flux, **DEFAULTS, **arguments) as engine:
        layers = engine.worker.vllm_config.compilation_config.static_forward_context
        names = [layer.attn_backend.get_name() for layer in layers.values()]
        answers = engine.generate(prompts, 60)
        return answers + engine.generate([random_prompt(320, 2, VOCABULARY)], 60), names


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Give the model that a method drafts for, and the error of FLASH_ATTN's answers with it."""

    @cache
    def made(kind):
        model = write_target(tmp_path_factory.mktemp("target") / "model", kind)
        round_to_bfloat16(model)
        reference = ReferenceModel(model)
        stock, _ = _answers(model, None, attention_backend="FLASH_ATTN")
        plain = [replay(reference, a, PATTERN, [FULL] * LAYERS, follow_tokens=True) for a in stock]
        return model, max(logprob_errors(a, r)[1] for a, r in zip(stock, plain, strict=True))

    return lambda method: made("mtp" if method == "mtp" else "any other")


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "mtp"])
def test_router(method, target, tmp_path):
    model, allowed = target(method)
    drafting = write_drafter(tmp_path / "drafter", method)
    if "model" in drafting:
        round_to_bfloat16(tmp_path / "drafter")
    folder = write_random_router(
        tmp_path / "router",
        num_layers=LAYERS,
        head_dim=HEAD_DIM,
        model_folder=model,
        vocab_size=VOCABULARY,
        **SIZES,
    ).parent
    reference = ReferenceModel(model)
    router = ReferenceRouter.load(folder / ROUTER_FILE_NAME)
    answers, backends = _answers(model, {"router": str(folder)}, speculative_config=drafting)
    assert backends[:LAYERS] == ["FLUX"] * LAYERS
    assert set(backends[LAYERS:]) == {"FLASH_ATTN"}
    assert_verified_drafts(answers)
    for answer in answers:
        request = replay(reference, answer, PATTERN, router=router, margin=0.1, follow_tokens=True)
        assert logprob_errors(answer, request)[1] <= 2 * allowed
