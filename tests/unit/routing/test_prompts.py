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


@pytest.mark.parametrize("step_tokens", [1, 4])
@pytest.mark.parametrize("length", [1, 100, REACH])
def test_a_short_prompt_is_looked_at_in_time(length: int, step_tokens: int) -> None:
    """Every step adds the most it can: the check comes with the step that crosses the reach, or a
    step early, and in none of those before."""
    prompts = OpenPrompts(REACH, step_tokens)
    prompts.begin_step()
    prompts.add(prompt("a", length))
    end, checks, found = length, 0, []
    while not found:
        if prompts.begin_step():
            checks += 1
            found = due(prompts, a=end)
        else:
            assert end <= REACH
        end += step_tokens
    assert REACH < end - step_tokens <= REACH + step_tokens
    assert checks <= 3


def test_nothing_open_nothing_to_look_at() -> None:
    prompts = OpenPrompts(REACH)
    assert not prompts.begin_step()
    prompts.add(prompt("a", 500))
    assert prompts.begin_step()
    assert due(prompts, a=100) == ["a"]
    assert not prompts.begin_step()


def test_the_next_prompt_is_looked_at_after_the_first_one_ended() -> None:
    prompts = OpenPrompts(REACH)
    prompts.add(prompt("a", 150))
    prompts.add(prompt("b", 100))
    prompts.discard(["a"])
    steps = sum(1 for _ in range(60) if prompts.begin_step() and due(prompts, b=100) == [])
    assert steps <= 1
    assert prompts.begin_step() or prompts.begin_step()
    assert due(prompts, b=REACH + 1) == ["b"]


def test_each_of_several_open_prompts_is_looked_at_in_time() -> None:
    """One falls due while others have long to go: all are taken with their first token too many."""
    prompts = OpenPrompts(REACH)
    ends = {"a": 155, "b": 100, "c": 40}
    for name, length in ends.items():
        prompts.add(prompt(name, length))
    taken = {}
    for _ in range(REACH):
        if prompts.begin_step():
            taken |= {name: ends[name] for name in due(prompts, **ends)}
        ends = {name: end + 1 for name, end in ends.items()}
    assert taken == dict.fromkeys("abc", REACH + 1)


def test_announced_again_it_is_looked_at_no_later() -> None:
    """After a preemption: its generated text is among its tokens then."""
    prompts = OpenPrompts(REACH)
    prompts.add(prompt("a", 100))
    end = 100
    while end < 150:
        if prompts.begin_step():
            assert due(prompts, a=end) == []
        end += 1
    prompts.add(prompt("a", 100))
    while not (prompts.begin_step() and due(prompts, a=end)):
        end += 1
    assert end == REACH + 1


def test_ended_requests_are_forgotten() -> None:
    prompts = OpenPrompts(REACH)
    prompts.add(prompt("a", 5))
    prompts.discard({"a", "never seen"})
    assert due(prompts, a=500) == []
