"""Drafters with layers of their own on a GPU: V2's runner, CUDA graphs, asynchronous scheduling.

Oracle: tests/helpers/reference.py over the same bfloat16 weights, by the rule of test_serving.py:
at most twice the error that vLLM's own FLASH_ATTN makes with the same drafter, all layers FULL.
"""

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
    "gpu_memory_utilization": 0.1,  # several processes share the GPU
}


def _answers(model, flux, drafting):
    """Answer a batch and a prompt alone; returns the drafter's backends too."""
    backend = {"attention_backend": "FLASH_ATTN"} if flux is None else {}
    arguments = DEFAULTS | backend | {"speculative_config": drafting}
    prompts = [random_prompt(n, n, VOCABULARY) for n in (30, 185, 700, 2000)]
    with Engine(model, flux, **arguments) as engine:
        layers = engine.worker.vllm_config.compilation_config.static_forward_context
        names = [layer.attn_backend.get_name() for layer in layers.values()]
        answers = engine.generate(prompts, 60)
        return answers + engine.generate([random_prompt(320, 2, VOCABULARY)], 60), names


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "mtp"])
def test_router(method, tmp_path):
    model = write_target(tmp_path / "model", method)
    drafting = write_drafter(tmp_path / "drafter", method)
    round_to_bfloat16(model)
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
    stock, _ = _answers(model, None, drafting)
    ours, backends = _answers(model, {"router": str(folder)}, drafting)
    assert backends[:LAYERS] == ["FLUX"] * LAYERS
    assert set(backends[LAYERS:]) == {"FLASH_ATTN"}
    assert_verified_drafts(ours)
    plain = [replay(reference, a, PATTERN, [FULL] * LAYERS, follow_tokens=True) for a in stock]
    allowed = max(logprob_errors(a, r)[1] for a, r in zip(stock, plain, strict=True))
    for answer in ours:
        request = replay(reference, answer, PATTERN, router=router, margin=0.1, follow_tokens=True)
        assert logprob_errors(answer, request)[1] <= 2 * allowed
