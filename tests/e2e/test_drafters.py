"""Speculative decoding with drafters that have layers of their own: EAGLE, MTP, draft models.

Oracles: stock vLLM with the same drafter under policy `full`, to the bit; and
tests/helpers/reference.py, fed the drafts that stood, under a router. Drafters are random, so most
of what they propose is refused. Pinned: the drafter's layers get vLLM's own backend, share KV cache
groups with the model's, and are in no route, count or probe.
"""

from pathlib import Path

import pytest

from flux_vllm.router.place import beside_weights
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.drafters import HEAD_DIM, LAYERS, VOCABULARY, write_drafter, write_target
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt, write_random_router
from tests.helpers.reference import ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import (
    LOGPROB_TOLERANCE,
    assert_likeliest,
    assert_verified_drafts,
    logprob_errors,
    replay,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK_SIZE = 32
PATTERN = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
METHODS = [
    pytest.param("draft_model", marks=pytest.mark.long),
    pytest.param("eagle", marks=pytest.mark.long),
    "eagle3",
    "mtp",
]


@pytest.fixture(scope="module", params=METHODS)
def speculation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A model with a router beside it, and what drafts for it."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_target(folder / "model", request.param)
    write_random_router(
        beside_weights(model).parent,
        num_layers=LAYERS,
        head_dim=HEAD_DIM,
        pool_tokens=48,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=model,
        vocab_size=VOCABULARY,
    )
    return model, write_drafter(folder / "drafter", request.param)


def _answers(model: Path, drafting: dict, flux: dict | None):
    """Answer a batch in chunks, and a prompt alone; returns drafters' backends, by layer, too."""
    prompts = [random_prompt(n, seed=n, vocab_size=VOCABULARY) for n in (30, 185, 700)]
    with Engine(
        model, flux, block_size=BLOCK_SIZE, max_num_batched_tokens=256, speculative_config=drafting
    ) as engine:
        layers = engine.worker.model_runner.compilation_config.static_forward_context
        drafters = engine.worker.model_runner.drafter._draft_attn_layer_names
        backends = {name: layers[name].attn_backend.get_name() for name in drafters}
        answers = engine.generate(prompts, 60)
        answers += engine.generate([random_prompt(320, seed=2, vocab_size=VOCABULARY)], 60)
        return answers, backends


def test_full_is_stock_vllm(speculation):
    (ours, backends), (stock, others) = (
        _answers(*speculation, flux) for flux in ({"policy": "full"}, None)
    )
    assert backends == others
    assert set(backends.values()) == {"CPU_ATTN"}
    assert [a.tokens for a in ours] == [a.tokens for a in stock]
    assert [a.logprobs for a in ours] == [a.logprobs for a in stock]
    assert [a.steps for a in ours] == [a.steps for a in stock]  # so many drafts were accepted
    assert_verified_drafts(ours)


def test_router(speculation):
    model, _ = speculation
    answers, _ = _answers(*speculation, {})
    assert_verified_drafts(answers)
    reference, router = ReferenceModel(model), ReferenceRouter.load(beside_weights(model))
    for answer in answers:
        request = replay(reference, answer, PATTERN, router=router, follow_tokens=True)
        assert logprob_errors(answer, request)[1] < LOGPROB_TOLERANCE
        assert_likeliest(answer, request, list(range(VOCABULARY)))
        assert answer.routes is None or len(answer.routes) == LAYERS
