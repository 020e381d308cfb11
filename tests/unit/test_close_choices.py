"""The rule for XAttention engines in bfloat16, on stand-ins for engines: right ones and wrong ones.

Oracle: plain transformers in bfloat16 is a right engine. A wrong one has its answers changed, or
leaves out a chosen block.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.helpers.close_choices import (
    assert_chosen_as_exactly,
    before_close_choices,
    block_medians,
)
from tests.helpers.engine import Answer
from tests.helpers.models import random_prompt, round_to_bfloat16, write_tiny_llama
from tests.helpers.oracle import masks
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, SparsePattern
from tests.helpers.replay import logprob_errors, replay

PATTERN = SparsePattern(32, 128, 16, "xattention", threshold=0.6)
ROUTES = [SPARSE, FULL, SPARSE, FULL]
LENGTHS = [60, 161, 256, 1000]
CHUNK, OUTPUT = 331, 16
LATE_BLOCK = 6  # of the long prompt's 0 to 7, behind its first close choice


class Stand:
    """The models of one folder, and what right engines answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exact = ReferenceModel(folder)
        self.rounded = ReferenceModel(folder, torch.bfloat16)
        self.answers = [self.answer(length) for length in LENGTHS]
        full = [self.answer(length, [FULL] * 4) for length in LENGTHS[:3]]
        errors = [
            logprob_errors(
                answer, replay(self.exact, answer, PATTERN, [FULL] * 4, follow_tokens=True)
            )
            for answer in full
        ]
        prompt, output = zip(*errors, strict=True)
        self.allowed = (max(prompt), max(output))

    def answer(self, length: int, routes: list[int] | None = None) -> Answer:
        """Answer a prompt as an engine of bfloat16 would."""
        chunks = [CHUNK] * (length // CHUNK) + [length % CHUNK]
        request = self.rounded.run(
            random_prompt(length, seed=length),
            chunks,
            pattern=PATTERN,
            routes=routes or ROUTES,
            num_decode=OUTPUT,
        )
        pairs = zip(request.output_tokens, request.output_logprobs, strict=True)
        return Answer(
            prompt=list(request.prompt),
            tokens=request.output_tokens,
            logprobs=[row[token].item() for token, row in pairs],
            candidates=[],
            prompt_logprobs=[None, *request.prompt_logprobs[1:].tolist()],
            cached_tokens=0,
            steps=[(step.start, step.length, step.phase) for step in request.steps],
        )

    def check(self, answers: list[Answer]) -> None:
        assert_chosen_as_exactly(answers, self.folder, self.exact, PATTERN, ROUTES, self.allowed)


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    folder = write_tiny_llama(tmp_path_factory.mktemp("llama"))
    round_to_bfloat16(folder)
    return Stand(folder)


def _disturb(answer: Answer, positions: range, error: float) -> None:
    """Change a prompt's log-probabilities; the first has none."""
    for position in positions:
        logprob = answer.prompt_logprobs[position]
        assert logprob is not None
        answer.prompt_logprobs[position] = logprob + error


def test_plain_transformers_pass(stand: Stand) -> None:
    """With a long prompt, most of which comes after a close choice."""
    stand.check(stand.answers)
    exact = replay(stand.exact, stand.answers[-1], PATTERN, ROUTES, follow_tokens=True)
    assert before_close_choices(exact) < LATE_BLOCK * 128


def test_one_wrong_token_before_close_choices_fails(stand: Stand) -> None:
    answers = deepcopy(stand.answers[:-1])
    _disturb(answers[1], range(100, 101), 1)
    with pytest.raises(AssertionError, match="worst sure prompt"):
        stand.check(answers)
    answers = deepcopy(stand.answers[:-1])
    answers[1].logprobs[3] += 1
    with pytest.raises(AssertionError, match="worst sure output"):
        stand.check(answers)


def test_one_wrong_late_block_fails(stand: Stand) -> None:
    """In all heads and sparse layers its queries lose the latest of the key blocks chosen."""
    choose = masks.choose_blocks

    def forgetful(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, margin = choose(*arguments)
        if len(chosen) > LATE_BLOCK:
            taken = chosen[LATE_BLOCK, 1:LATE_BLOCK].nonzero()
            chosen[LATE_BLOCK, 1 + taken[-1:]] = False
        return chosen, margin

    with patch.object(masks, "choose_blocks", forgetful):
        wrong = stand.answer(LENGTHS[-1])
    with pytest.raises(AssertionError, match="worst block's median"):
        stand.check([*stand.answers[:-1], wrong])


def test_wrong_outputs_after_close_choices_fail(stand: Stand) -> None:
    answers = deepcopy(stand.answers)
    answers[-1].logprobs = [logprob - 0.3 for logprob in answers[-1].logprobs]
    with pytest.raises(AssertionError, match="worst block's median"):
        stand.check(answers)


def test_many_wrong_tokens_fail(stand: Stand) -> None:
    """Every third one of the late blocks, which no median shows."""
    answers = deepcopy(stand.answers)
    _disturb(answers[-1], range(LATE_BLOCK * 128, LENGTHS[-1], 3), 2)
    with pytest.raises(AssertionError, match="mean prompt"):
        stand.check(answers)


def test_too_few_sure_tokens_fail(stand: Stand) -> None:
    with pytest.raises(AssertionError, match="too few sure"):
        stand.check(stand.answers[-1:])


def test_block_medians_by_hand() -> None:
    errors = [3.0] * 63 + [0.0] * 65 + [0.0] * 63 + [3.0] * 65 + [1.0] * 15
    assert block_medians(errors) == [0, 3]
    assert block_medians([*errors, 1.0]) == [0, 3, 1]
    assert block_medians(errors[:15]) == []
