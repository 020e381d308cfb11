"""Compare an engine's answer with the reference that computes the same steps."""

from collections.abc import Sequence

from .engine import Answer
from .reference import (
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
# Query sums are kept in bfloat16, so P(FULL) may differ by that much.
P_FULL_MARGIN = 0.01


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
        router: else what decides; each step's routes are then checked against its P(FULL) and
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
        routes=routes,
        router=router,
        threshold=threshold,
        history=history.first(answer.steps[0][0]) if history is not None else None,
        score_prompt=bool(answer.prompt_logprobs),
        forced_tokens=answer.tokens if follow_tokens else None,
    )
    for index, (start, length, phase) in enumerate(answer.steps):
        if start != len(request.history):
            request.preempt(start)
        if router is None:
            request.step(length, phase)
            continue
        taken = answer.step_routes[index]
        record = request.step(length, phase, taken)
        if record.p_full is not None:
            _check_routes(taken, record.p_full.tolist(), threshold, margin)
    return request


def _check_routes(
    taken: Sequence[int], p_full: Sequence[float], threshold: float, margin: float
) -> None:
    for layer, (route, probability) in enumerate(zip(taken, p_full, strict=True)):
        if abs(probability - threshold) > margin:
            expected = FULL if probability >= threshold else SPARSE
            assert route == expected, f"layer {layer}: P(FULL) {probability:.4f}, route {route}"


def logprob_errors(answer: Answer, request: Request) -> tuple[float, float]:
    """Give the largest error of a prompt token's and of an output token's log-probability."""
    prompt = [
        abs(got - expected)
        for got, expected in zip(
            answer.prompt_logprobs[1:], request.prompt_logprobs[1:].tolist(), strict=False
        )
        if expected == expected  # NaN: the predecessor was cached
    ]
    output = [
        abs(got - row[token].item())
        for got, token, row in zip(
            answer.logprobs, answer.tokens, request.output_logprobs, strict=False
        )
    ]
    return max(prompt, default=0.0), max(output)


def assert_same(answer: Answer, request: Request) -> None:
    """Check greedy tokens and log-probabilities."""
    assert answer.tokens == request.output_tokens[: len(answer.tokens)]
    prompt_error, output_error = logprob_errors(answer, request)
    assert prompt_error < LOGPROB_TOLERANCE
    assert output_error < LOGPROB_TOLERANCE
