"""Hold an engine under XAttention in bfloat16 to its rule: twice plain torch's error in that dtype.

Rounding may decide between blocks whose estimates are close, and another block moves
log-probabilities by up to 3 in the tiny models: at its query block's positions and, by way of
their keys, at later ones. Plain transformers in bfloat16 does so too. As few choices turn, two or
ten in a prompt of 3,001 tokens, the worst error says nothing: it was 0.3 to 3.2 there. The median
over a query block says more: a turned choice is one head's in one layer, and most tokens of the
block hardly notice it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from tests.helpers.engine import Answer
from tests.helpers.reference import ReferenceModel, Request, SparsePattern
from tests.helpers.replay import replay, token_errors

# Bfloat16 turned 138 choices of 12,672 on the CPU, the widest of 0.0065; of those that no earlier
# turn had a part in, the widest of 0.0032.
CHOICE_MARGIN = 0.02
QUERY_BLOCK = 128
# By that many times the median of plain torch's sure tokens may a block's be larger. Plain torch's
# own was at most 2.6 times, 3.5 with more rounding added. Of one late block with wrong choices in
# all heads it was 2.7 to 43 times, and in 24 of 30 cases above 5.
BLOCK_FACTOR = 5


def before_close_choices(request: Request, margin: float = CHOICE_MARGIN) -> int:
    """Count the first positions that no choice with less than a margin has a part in."""
    close = (request.margins < margin).nonzero()
    return int(close[0]) if len(close) else len(request.margins)


def assert_chosen_as_exactly(
    answers: Sequence[Answer],
    folder: Path,
    reference: ReferenceModel,
    pattern: SparsePattern,
    routes: Sequence[int],
    allowed: tuple[float, float],
) -> None:
    """Check the errors of log-probabilities.

    Before a prompt's first close choice the worst is measured by that under full attention. Over
    all tokens it is the root mean square, measured by that of plain transformers in bfloat16. Of
    each query block, and of the outputs after a prompt, it is the median, measured by that of plain
    transformers before close choices. What passes unseen after a prompt's first close choice: one
    head's wrong choice, which is what rounding does too; other wrong choices in one block that cost
    as little, such as (at times) one key block too few in each of its heads; and wrong tokens,
    fewer than half of a block, that leave the root mean square below its bound.

    Args:
        answers: with prompt log-probabilities.
        folder: of the model.
        reference: the model in float32.
        pattern: of kind "xattention".
        routes: per layer.
        allowed: the largest errors under full attention, of prompt and output tokens.
    """
    rounding = ReferenceModel(folder, torch.bfloat16)
    sure: tuple[list[float], list[float]] = [], []
    ours: tuple[list[float], list[float]] = [], []
    theirs: tuple[list[float], list[float]] = [], []
    their_sure: list[float] = []
    medians: list[float] = []
    for answer in answers:
        exact = replay(reference, answer, pattern, routes, follow_tokens=True)
        found = token_errors(answer, exact)
        plain = _rounding_errors(rounding, answer, exact)
        count, first_output = before_close_choices(exact), len(answer.prompt) - 1
        sure[0].extend(found[0][:count])
        sure[1].extend(found[1][: max(0, count - first_output)])
        their_sure += plain[0][:count]
        medians += block_medians(found[0]) + block_medians(found[1])
        for index in range(2):
            ours[index].extend(found[index])
            theirs[index].extend(plain[index])
    print(f"\n{len(sure[0])} of {len(ours[0])} prompt tokens come before close choices")
    limits = [("worst block's median", max(medians), BLOCK_FACTOR * median(their_sure))]
    for index, kind in enumerate(("prompt", "output")):
        assert len(sure[index]) > len(ours[index]) / 3, f"too few sure {kind} tokens"
        limits.append((f"worst sure {kind}", max(sure[index]), 2 * allowed[index]))
        limits.append((f"mean {kind}", _mean(ours[index]), 2 * _mean(theirs[index])))
    for name, error, limit in limits:
        print(f"{name} error {error:.4f}, limit {limit:.4f}", flush=True)
    for name, error, limit in limits:
        assert error <= limit, f"{name} error {error}, limit {limit}"


def block_medians(errors: Sequence[float]) -> list[float]:
    """Give the median error of each query block, but for a last one of few tokens."""
    starts = range(0, len(errors), QUERY_BLOCK)
    blocks = [errors[start : start + QUERY_BLOCK] for start in starts]
    return [median(block) for block in blocks if len(block) >= QUERY_BLOCK // 8]


def _mean(errors: Sequence[float]) -> float:
    """Give the root mean square."""
    return (sum(error * error for error in errors) / len(errors)) ** 0.5


def _rounding_errors(
    rounding: ReferenceModel, answer: Answer, exact: Request
) -> tuple[list[float], list[float]]:
    """Give `token_errors` of a server that is plain transformers of low precision."""
    request = replay(rounding, answer, exact.pattern, exact.routes, follow_tokens=True)
    logprobs = [
        row[token].item()
        for token, row in zip(answer.tokens, request.output_logprobs, strict=False)
    ]
    served = replace(answer, prompt_logprobs=request.prompt_logprobs.tolist(), logprobs=logprobs)
    return token_errors(served, exact)
