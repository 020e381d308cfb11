"""What is asked of an engine for each variant, and what is kept.

Oracle: an engine whose answers and decisions are written out here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_tasks.agreement import Teacher
from benchmarks.real_tasks.answering import Answering, Family, check_routes, teacher_file
from benchmarks.real_tasks.engine import Answer, Request, RequestRoutes
from benchmarks.real_tasks.samples import Asked, Sample
from benchmarks.real_tasks.store import ResultFolder
from benchmarks.real_tasks.variants import EngineOptions, parse_variants

LAYERS = 4
OPTIONS = EngineOptions(model=Path("models/m"))
TOPS = {7: -0.1, 8: -3.0}


class FakeEngine:
    """Answers every prompt with the token 7, and decides as it was last told to."""

    def __init__(self, probabilities: Sequence[float] = (0.2, 0.4, 0.6, 0.8)) -> None:
        self.probabilities = list(probabilities)
        self.calls: list[tuple[Any, ...]] = []
        self.asked: list[Request] = []
        self.obeys = True
        self.letters = ""

    def ask(self, requests: Sequence[Request], title: str) -> list[Answer]:
        self.asked += requests
        return [
            Answer(
                id=f"cmpl-{at}",
                text="7",
                token_ids=list(request.forced) or [7],
                finish_reason="stop",
                top_logprobs=[TOPS] * max(1, len(request.forced)) if request.with_logprobs else [],
            )
            for at, request in enumerate(requests)
        ]

    def call_worker(self, method: str, *args: Any) -> None:
        self.calls.append((method, *args))
        if not self.obeys:
            return
        if method == "flux_set_threshold":
            self.letters = "".join("FS"[p < args[0]] for p in self.probabilities)
        else:
            self.letters = "".join("FS"[layer in args[0]] for layer in range(LAYERS))

    def routes(self, ids: Sequence[str], title: str) -> list[RequestRoutes | None]:
        # The last one's context stayed within sink and window.
        found = RequestRoutes(self.letters, list(self.probabilities))
        return [found] * (len(ids) - 1) + [None]


def _family(name: str, count: int = 3) -> Family:
    asked = [
        Asked(
            Sample(task="hidden_value", id=f"{name}-{at}", prompt="?", answers=("7",),
                   max_new_tokens=4),
            [at, at + 1], 0,
        )
        for at in range(count)
    ]  # fmt: skip
    return Family.of(name, asked)


def _answering(folder: Path, texts: list[str], in_time: bool = True) -> Answering:
    variants = parse_variants(texts, seed=1)
    return Answering(OPTIONS, variants, LAYERS, ResultFolder(folder), lambda: in_time)


def test_every_threshold_is_set_before_its_answers(tmp_path: Path) -> None:
    engine = FakeEngine()
    _answering(tmp_path, ["router:a@0.3,0.7"]).answer(engine, [_family("gsm8k")])  # type: ignore[arg-type]
    assert engine.calls == [("flux_set_threshold", 0.3), ("flux_set_threshold", 0.7)]
    results = ResultFolder(tmp_path)
    rows = results.read("a-t0.7", "gsm8k")["rows"]
    assert [row["routes"] for row in rows] == ["SSSF", "SSSF", None]
    assert [row["sparse_share"] for row in rows] == [0.75, 0.75, None]
    assert [row["score"] for row in rows] == [1.0] * 3
    assert rows[0]["prompt_tokens"] == 2
    assert rows[0]["token_ids"] == [7]
    assert results.read("a-t0.3", "gsm8k")["rows"][0]["routes"] == "SFFF"
    assert results.read("a-t0.3", "gsm8k")["variant"]["seed"] == 1


def test_fixed_routes_are_set_before_their_answers(tmp_path: Path) -> None:
    engine = FakeEngine()
    texts = ["full", "sparse", "static:1,3"]
    _answering(tmp_path, texts).answer(engine, [_family("needles")])  # type: ignore[arg-type]
    assert [call[1] for call in engine.calls] == [[], [0, 1, 2, 3], [1, 3]]
    assert ResultFolder(tmp_path).read("static2", "needles")["rows"][0]["routes"] == "FSFS"


def test_an_engine_that_does_not_switch_is_found_out(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.obeys, engine.letters = False, "SFFF"
    answering = _answering(tmp_path, ["router:a@0.3,0.7"])
    with pytest.raises(RuntimeError, match="a-t0.7: expected the routes SSSF, found SFFF"):
        answering.answer(engine, [_family("gsm8k")])  # type: ignore[arg-type]
    assert ResultFolder(tmp_path).labels() == ["a-t0.3"]


def test_check_routes_leaves_what_rounding_hides_and_unrouted_layers() -> None:
    (variant,) = parse_variants(["router:a@0.5"])
    check_routes(variant, RequestRoutes("SF-F", [0.4995, 0.5004, None, 0.9]), LAYERS)
    check_routes(variant, RequestRoutes("FS-F", [0.4995, 0.5004, None, 0.9]), LAYERS)
    with pytest.raises(RuntimeError, match=r"layers \[3\] differ"):
        check_routes(variant, RequestRoutes("SF-S", [0.4995, 0.5004, None, 0.9]), LAYERS)


def test_full_attention_leaves_its_answers_for_others(tmp_path: Path) -> None:
    engine = FakeEngine()
    families = [_family("needles"), _family("gsm8k")]
    _answering(tmp_path, ["flash_attn"]).answer(engine, families)  # type: ignore[arg-type]
    assert engine.calls == []
    assert [request.with_logprobs for request in engine.asked] == [True] * 3 + [False] * 3
    folder = tmp_path / "flash_attn"
    teacher = Teacher.read(teacher_file(folder, "needles"), families[0].digest)
    assert teacher.answers == [[7]] * 3
    assert not teacher_file(folder, "gsm8k").exists()


def test_agree_forces_full_attentions_answers(tmp_path: Path) -> None:
    family = _family("needles", 2)
    teacher = Teacher(family.digest, [[7, 7], [8]], [[TOPS, {9: -0.1, 7: -3.0}], [TOPS]])
    teacher.write(teacher_file(tmp_path / "flash_attn", "needles"))
    engine = FakeEngine()
    answering = _answering(tmp_path, ["full"])
    answering.agree(engine, [family], tmp_path / "flash_attn", 0)  # type: ignore[arg-type]
    assert [request.forced for request in engine.asked] == [(7, 7), (8,)]
    assert all(request.with_logprobs for request in engine.asked)
    rows = ResultFolder(tmp_path).read("full", "needles-agreement")["rows"]
    assert [row["equal_tokens"] for row in rows] == [0.5, 1.0]
    assert [row["same_prefix"] for row in rows] == [0.5, 1.0]
    assert rows[1]["kl"] == pytest.approx(0.0)
    assert rows[0]["kl"] > 1


def test_agree_says_what_it_waits_for(tmp_path: Path) -> None:
    answering = _answering(tmp_path, ["full"])
    with pytest.raises(RuntimeError, match="expected full attention's answers in .* within 0 s"):
        answering.agree(FakeEngine(), [_family("needles")], tmp_path, 0)  # type: ignore[arg-type]


def test_what_is_there_is_not_asked_again(tmp_path: Path) -> None:
    families = [_family("needles"), _family("gsm8k")]
    answering = _answering(tmp_path, ["full", "sparse"])
    assert answering.is_anything_missing(families, [], None)
    answering.answer(FakeEngine(), families[:1])  # type: ignore[arg-type]
    engine = FakeEngine()
    answering.answer(engine, families)  # type: ignore[arg-type]
    assert len(engine.asked) == 6
    assert not answering.is_anything_missing(families, [], None)
    assert answering.is_anything_missing(families, families[:1], None)


def test_no_measure_begins_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    _answering(tmp_path, ["full"], in_time=False).answer(engine, [_family("gsm8k")])  # type: ignore[arg-type]
    assert engine.asked == []
    assert "no time is left for full, gsm8k" in capsys.readouterr().out


def test_rows_are_plain_json(tmp_path: Path) -> None:
    _answering(tmp_path, ["full"]).answer(FakeEngine(), [_family("gsm8k")])  # type: ignore[arg-type]
    json.loads((tmp_path / "full" / "gsm8k.json").read_text())
