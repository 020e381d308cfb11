"""Compare an engine's answer with the reference that computes the same steps."""

import math
from collections.abc import Sequence

import torch

from tests.helpers.engine import Answer
from tests.helpers.reference import (
    FULL,
    SPARSE,
    History,
    ReferenceModel,
    ReferenceRouter,
    Request,
    SparsePattern,
)

# The engine in float32 differs from transformers by its kernels' order of additions alone; a
# wrong key or route costs more than 0.02 on the tiny models (test_static_routes checks that).
LOGPROB_TOLERANCE = 2e-3
# P(FULL) comes from a float32 forward of a few tokens; padding and kernels round otherwise.
P_FULL_MARGIN = 1e-3


def replay(
    model: ReferenceModel,
    answer: Answer,
    pattern: SparsePattern,
    routes: Sequence[int] | None = None,
    router: ReferenceRouter | None = None,
    history: History | None = None,
    threshold: float = 0.5,
    margin: float = P_FULL_MARGIN,
    follow_tokens: bool = False,
) -> Request:
    """Compute an answer's steps in the reference.

    Args:
        model: the reference.
        answer: of the engine.
        pattern: what SPARSE means.
        routes: per layer, when a policy fixes them.
        router: else what decides; the answer's routes are checked against its P(FULL) and
            followed, so that a near tie does not part the two histories.
        history: what the prefix cache held when the request came.
        threshold: FULL where P(FULL) is at least this.
        margin: how near the threshold P(FULL) may be for either route to pass.
        follow_tokens: continue with the engine's tokens, where low precision decides ties.
    Returns: Request: computed.
    """
    request = Request(
        model,
        answer.prompt,
        pattern,
        routes=routes if router is None else answer.routes,
        router=router,
        threshold=threshold,
        history=history.first(answer.steps[0][0]) if history is not None else None,
        score_prompt=bool(answer.prompt_logprobs),
        forced_tokens=answer.tokens if follow_tokens else None,
    )
    if request.p_full is not None and answer.routes is not None:
        check_routes(answer.routes, request.p_full, threshold, margin)
    for start, length, phase in answer.steps:
        if len(request.output_tokens) == len(answer.tokens):
            break  # asynchronous scheduling began a step for a request that then ended
        if start != len(request.history):
            request.preempt(start)
        sampled = len(request.output_tokens)
        accepted = max(0, start + length - len(request.tokens))
        drafts = answer.tokens[sampled : sampled + accepted]
        request.step(length, phase, drafts)
    return request


def check_routes(
    routes: Sequence[int], p_full: torch.Tensor, threshold: float, margin: float
) -> None:
    """Check routes against the reference's own P(FULL) [layers]."""
    for layer, (route, probability) in enumerate(zip(routes, p_full.tolist(), strict=True)):
        assert math.isfinite(probability)
        if abs(probability - threshold) > margin:
            expected = FULL if probability >= threshold else SPARSE
            assert route == expected, f"layer {layer}: P(FULL) {probability:.4f}, route {route}"


def assert_routed(
    answer: Answer,
    model: ReferenceModel,
    router: ReferenceRouter,
    pattern: SparsePattern,
    history: History | None = None,
    threshold: float = 0.5,
) -> Request:
    """Check an answer under policy `router`: its routes, P(FULL), tokens and log-probabilities."""
    request = replay(model, answer, pattern, router=router, history=history, threshold=threshold)
    assert_same(answer, request)
    ends = [start + length for start, length, _ in answer.steps]
    decided = max(len(answer.prompt), *ends) > router.reach
    assert (answer.routes is not None) == decided
    if not decided:
        return request
    for got, expected in zip(answer.p_full, request.p_full.tolist(), strict=True):
        assert abs(got - expected) < P_FULL_MARGIN
    return request


def token_errors(answer: Answer, request: Request) -> tuple[list[float], list[float]]:
    """Give the errors of each prompt token's but the first and each output token's log-probability.

    NaN for a prompt token whose predecessor was cached.
    """
    pairs = zip(answer.prompt_logprobs[1:], request.prompt_logprobs[1:].tolist(), strict=False)
    prompt = [abs(got - expected) for got, expected in pairs]
    output = [
        abs(got - row[token].item())
        for got, token, row in zip(
            answer.logprobs, answer.tokens, request.output_logprobs, strict=False
        )
    ]
    return prompt, output


def logprob_errors(answer: Answer, request: Request) -> tuple[float, float]:
    """Give the largest error of a prompt token's and of an output token's log-probability."""
    prompt, output = token_errors(answer, request)
    computed = [
        error
        for error, expected in zip(prompt, request.prompt_logprobs[1:].tolist(), strict=False)
        if expected == expected  # NaN: the predecessor was cached
    ]
    # The greatest of numbers may pass over a NaN.
    assert all(math.isfinite(error) for error in (*computed, *output))
    return max(computed, default=0.0), max(output)


def assert_same(answer: Answer, request: Request) -> None:
    """Check greedy tokens and log-probabilities."""
    assert answer.tokens == request.output_tokens[: len(answer.tokens)]
    prompt_error, output_error = logprob_errors(answer, request)
    assert prompt_error < LOGPROB_TOLERANCE
    assert output_error < LOGPROB_TOLERANCE


def assert_likeliest(
    answer: Answer, request: Request, allowed: Sequence[int], tolerance: float = LOGPROB_TOLERANCE
) -> None:
    """Check that each output token is the likeliest of the allowed ones, within a tolerance."""
    for token, row in zip(answer.tokens, request.output_logprobs, strict=True):
        assert row[token] >= max(row[other] for other in allowed) - tolerance


def assert_verified_drafts(answers: Sequence[Answer]) -> None:
    """Check that among the decode steps some had drafts accepted, and some had none."""
    stood = [n for answer in answers for _, n, phase in answer.steps if phase == "decode"]
    assert min(stood) == 1
    assert max(stood) > 1
