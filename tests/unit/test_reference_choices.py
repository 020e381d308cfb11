"""How close XAttention's block choices are, and what bfloat16 does to the reference.

Oracle: masses disturbed by less than the margin, chosen from anew; and sums done by hand.
"""

import math
from pathlib import Path

import pytest
import torch

from tests.helpers.close_choices import before_close_choices
from tests.helpers.models import random_prompt, write_tiny_llama
from tests.helpers.oracle.block_choice import choice_margin
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, SparsePattern

PATTERN = SparsePattern(20, 50, 16, "xattention", threshold=0.6)


def _choose(mass: list[float], share: float) -> tuple[list[int], list[int]]:
    """Split blocks into those taken and those left."""
    taken = sorted({0, len(mass) - 1})
    left = sorted(set(range(len(mass))) - set(taken), key=lambda block: -mass[block])
    while sum(mass[block] for block in taken) < share * sum(mass) and left:
        taken.append(left.pop(0))
    return taken, left


@pytest.mark.parametrize(
    ("mass", "share", "ratio"),
    [
        ([2, 30, 25, 5, 38], 0.9, 2),  # 5 left of at most 10
        ([2, 30, 25, 5, 38], 0.94, 6 / 5),
        ([2, 30, 25, 5, 38], 0.6, 6 / 5),  # 30 taken before 25
        ([2, 30, 25, 5, 38], 0.96, 5 / 4),  # all taken, 5 more than may be left
        ([60, 5, 35], 0.9, 2),  # the forced blocks suffice
        ([60, 40], 0.9, math.inf),
        ([7], 0.9, math.inf),
    ],
)
def test_margins_by_hand(mass: list[float], share: float, ratio: float) -> None:
    taken, left = _choose(mass, share)
    assert choice_margin(mass, taken, left, share) == pytest.approx(math.log(ratio))


def test_nothing_within_the_margin_chooses_otherwise() -> None:
    """Two estimates each off by half of it make up the margin."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mass = torch.randn(12, generator=generator).exp()
        taken, left = _choose(mass.tolist(), 0.8)
        margin = choice_margin(mass.tolist(), taken, left, 0.8)
        for _ in range(20):
            off = (torch.rand(12, generator=generator) - 0.5).sign() * 0.49 * margin
            assert set(_choose((mass * off.exp()).tolist(), 0.8)[0]) == set(taken)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


def test_bfloat16_reference_equals_float32_before_close_choices(folder: Path) -> None:
    """All but rounding, which moves the tiny model's log-probabilities by 0.2 at most."""
    exact, rounded = (
        ReferenceModel(folder, dtype).run(
            random_prompt(700, seed=3), [300, 400], pattern=PATTERN, routes=[SPARSE, FULL] * 2
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    # Two blocks give no choice.
    assert exact.margins[:256].isinf().all()
    assert exact.margins[256:].isfinite().any()
    sure = before_close_choices(exact, 0.005)
    assert 256 <= sure < 700
    errors = (exact.prompt_logprobs - rounded.prompt_logprobs)[1 : sure + 1].abs()
    assert 0 < errors.max() < 0.3
