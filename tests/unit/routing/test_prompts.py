"""Which requests are probed in a step.

Oracle: the rule of docs/ROUTE_STATE.md, written down for each case.
"""

import pytest

from flux_vllm.routing.prompts import OpenPrompts, Prompt

REACH = 160


def prompt(name: str, length: int) -> Prompt:
    return Prompt(name, length, list(range(length)))


def due(prompts: OpenPrompts, **ends: int) -> list[str]:
    return [found.request_id for found in prompts.take_due(ends)]


@pytest.mark.parametrize(
    ("length", "end", "is_due"),
    [
        (REACH, REACH, False),
        (REACH + 1, 1, True),  # with its first chunk, however short
        (REACH + 1, REACH + 1, True),
        (5, REACH, False),
        (5, REACH + 1, True),  # its generated text has outgrown the reach
        (5, REACH + 4, True),  # drafts included
    ],
)
def test_rule(length: int, end: int, is_due: bool) -> None:
    prompts = OpenPrompts(REACH)
    prompts.add(prompt("a", length))
    assert due(prompts, a=end) == ["a"] * is_due
    assert len(prompts) == 1 - is_due


def test_only_requests_of_the_step() -> None:
    prompts = OpenPrompts(REACH)
    for name in ("a", "b", "c"):
        prompts.add(prompt(name, 200))
    assert due(prompts, c=10, a=10, other=500) == ["a", "c"]
    assert due(prompts, a=20, b=10, c=20) == ["b"]
    assert due(prompts, a=30, b=20, c=30) == []


def test_prompt_that_grew_takes_the_place_of_the_older() -> None:
    prompts = OpenPrompts(REACH)
    prompts.add(prompt("a", 5))
    prompts.add(prompt("a", 200))
    (found,) = prompts.take_due({"a": 10})
    assert found.length == 200
    assert len(prompts) == 0


def test_ended_requests_are_forgotten() -> None:
    prompts = OpenPrompts(REACH)
    prompts.add(prompt("a", 5))
    prompts.discard({"a", "never seen"})
    assert due(prompts, a=500) == []
