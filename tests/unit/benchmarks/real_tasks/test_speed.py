"""What is timed, and what is made of the times.

Oracle: streams whose arrivals are written out.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.real_tasks import speed
from benchmarks.real_tasks.speed import OUTPUT_TOKENS, SpeedCases, time_engine

ASKED = -5


class CountingEncoder:
    """A token a character, which tells its place; of a question, 40 others."""

    def text_tokens(self, text: str) -> list[int]:
        return [ASKED] * 40 if "Question" in text else list(range(len(text)))


def test_every_case_is_timed_with_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def time_answers(
        url: str,
        bodies: list[dict[str, Any]],
        warm_up: int,
        at_once: int,
        title: str,
        in_waves: bool,
    ) -> list[list[tuple[float, int]]]:
        assert in_waves
        asked.append((url, bodies, warm_up, at_once, title))
        count = len(bodies) - warm_up
        # The first token after 10, 20, ... ms, the others 2 ms apart.
        return [
            [(10.0 * (at + 1) + 2.0 * token, 1) for token in range(OUTPUT_TOKENS)]
            for at in range(count)
        ]

    monkeypatch.setattr(speed, "time_answers", time_answers)
    monkeypatch.setattr(speed, "hay", lambda: "x" * 5000)
    cases = SpeedCases(lengths=(100, 200), concurrency=(1, 4), prompts=3)
    engine = SimpleNamespace(url="http://here")
    told: list[list[list[int]]] = []

    def share_of(prompts: list[list[int]]) -> float:
        told.append(prompts)
        return len(told) / 10

    rows = time_engine(engine, CountingEncoder(), cases, "full", share_of)  # type: ignore[arg-type]
    assert [(row["prompt_tokens"], row["at_once"], row["prompts"]) for row in rows] == [
        *((100, 1, 3), (100, 4, 8), (200, 1, 3), (200, 4, 8)),
    ]
    assert rows[0]["ttft_ms"]["median"] == 20.0
    assert rows[0]["ttft_ms"]["values"] == [10.0, 20.0, 30.0]
    assert rows[0]["token_ms"]["median"] == pytest.approx(2.0)
    assert rows[0]["bursts"] == 0
    ends = [10.0 * (at + 1) + 2.0 * (OUTPUT_TOKENS - 1) for at in (3, 7)]  # the last of each wave
    assert rows[1]["requests_s"]["values"] == [round(4e3 / end, 3) for end in ends]
    url, bodies, warm_up, at_once, _ = asked[1]
    assert (url, warm_up, at_once) == ("http://here/v1", 4, 4)
    assert len(bodies) == 4 + 8
    assert all(len(body["prompt"]) == 100 and body["stream"] for body in bodies)
    assert len({body["prompt"][0] for body in bodies}) == len(bodies)  # no two alike
    assert all(body["prompt"][60:] == [ASKED] * 40 for body in bodies)
    assert bodies[-1]["prompt"][59] == 4959  # the text's end, but for the question
    assert [row["sparse_share"] for row in rows] == [0.1, 0.2, 0.3, 0.4]
    assert told[1] == [body["prompt"] for body in bodies[4:]]  # of those that are timed
