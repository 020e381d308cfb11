"""Speculative decoding (ngram): rows of several queries, drafts accepted and refused.

Oracle: tests/helpers/reference.py, fed the drafts that stood; a row's window starts at its first
query's. Three allowed tokens make a random model repeat itself, so that its n-grams foretell it.
"""

import pytest

from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt
from tests.helpers.reference import FULL, SPARSE, SparsePattern
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
ALLOWED = [3, 77, 400]
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
STATIC = {
    "policy": "static",
    "sparse_layers": [0, 2],
    "sink_tokens": SINK_TOKENS,
    "window_tokens": WINDOW_TOKENS,
}


def _answers(folder, flux):
    """Answer a batch and a prompt alone."""
    prompts = [random_prompt(n, seed=n) for n in (30, 185, 700)]
    with Engine(
        folder, flux, block_size=BLOCK_SIZE, max_num_batched_tokens=256, speculative_config=NGRAM
    ) as engine:
        return [
            *engine.generate(prompts, 60, allowed_token_ids=ALLOWED),
            *engine.generate([random_prompt(320, seed=2)], 60, allowed_token_ids=ALLOWED),
        ]


@pytest.mark.parametrize("flux", [STATIC, {}], ids=["static", "router"])
def test_drafts(tiny_model, reference, reference_router, flux):
    answers = _answers(tiny_model, flux)
    assert_verified_drafts(answers)
    for answer in answers:
        request = replay(
            reference,
            answer,
            PATTERN,
            routes=[SPARSE, FULL, SPARSE, FULL] if flux else None,
            router=None if flux else reference_router,
            follow_tokens=True,
        )
        assert logprob_errors(answer, request)[1] < LOGPROB_TOLERANCE
        assert_likeliest(answer, request, ALLOWED)
