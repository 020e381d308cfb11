"""Stored scores against a plain scorer's; pins: scores of another policy or prompt reused."""

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.patterns import make_pattern, triangle
from flux_vllm.router.inputs import RouterInputs, parse_inputs
from flux_vllm.router.model import LayerRouter
from training.attach import RoutedModel
from training.data.encoding import Encoded
from training.distributed import World
from training.evaluation import stored_scores
from training.evaluation.scoring import Scorer
from training.evaluation.static_patterns import pattern
from training.evaluation.stored_scores import StoredScorer
from training.policies import StaticPolicy, ThresholdPolicy

INPUTS = parse_inputs(["ends:16"], [16, 32], [])


@pytest.fixture
def prompts() -> list[Encoded]:
    rng = np.random.default_rng(0)
    return [
        Encoded("needle", rng.integers(1, 256, 100 + at).astype(np.int32), 90, 40, 4)
        for at in range(7)
    ]


@pytest.fixture
def scorer(tiny_model: Callable[..., Any]) -> Scorer:
    return make_scorer(tiny_model(), "streaming")


def make_scorer(model: Any, name: str) -> Scorer:
    world = World(0, 1, torch.device("cpu"))
    return Scorer(RoutedModel(model, 8, 32), make_pattern(name, 8, 32), INPUTS, 1024, world)


def test_stored_scores_equal_computed_ones_and_are_not_computed_again(
    scorer: Scorer, prompts: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_scores, "_PIECE", 3)
    policy = ThresholdPolicy(LayerRouter(4, 8), 0.5)
    expected = scorer.score(prompts, policy)
    stored = StoredScorer(scorer, tmp_path, {"model": "tiny"})
    first = stored.score(prompts, policy)
    assert len(list(tmp_path.glob("*.npz"))) == 3
    next(tmp_path.glob("*.npz")).unlink()
    before = scorer.tokens
    second = StoredScorer(scorer, tmp_path, {"model": "tiny"}).score(prompts, policy)
    assert 0 < scorer.tokens - before <= 3 * 128
    for found in (first, second):
        np.testing.assert_allclose(found.score, expected.score)
        np.testing.assert_allclose(found.surprise, expected.surprise, rtol=1e-3)
        np.testing.assert_array_equal(found.sparse, expected.sparse)
        np.testing.assert_allclose(found.density, expected.density)


def test_everything_that_changes_scores_changes_the_place(
    scorer: Scorer, prompts: list[Encoded], tmp_path: Path
) -> None:
    router = LayerRouter(4, 8)
    policy = ThresholdPolicy(router, 0.5)
    calls: list[Any] = [
        (prompts, policy),
        (prompts, ThresholdPolicy(router, 0.6)),
        (prompts, ThresholdPolicy(LayerRouter(4, 8), 0.5)),
        (prompts, pattern(4, [0])),
        (prompts, pattern(4, [1])),
        (prompts[:-1], policy),
        ([replace(prompts[0], prompt_len=91), *prompts[1:]], policy),
        ([replace(prompts[0], prefix_len=3), *prompts[1:]], policy),
        ([replace(prompts[0], task="multi_key"), *prompts[1:]], policy),
    ]
    for setting in ({"dtype": "float32"}, {"dtype": "bfloat16"}):
        stored = StoredScorer(scorer, tmp_path, setting)
        for call in calls:
            stored.score(*call)
    assert len(list(tmp_path.glob("*.npz"))) == 2 * len(calls)


def test_routers_that_look_elsewhere_share_static_scores_alone(
    scorer: Scorer, prompts: list[Encoded], tmp_path: Path
) -> None:
    looks: list[RouterInputs] = [
        INPUTS,
        parse_inputs(["tail:16"], [16, 32], []),
        parse_inputs(["ends:16"], [16, 16], []),
        parse_inputs(["ends:8"], [16, 32], []),
        parse_inputs(["ends:16"], [16, 32], [3]),
    ]
    for inputs in looks:
        policy = ThresholdPolicy(LayerRouter(4, 8, inputs.vectors), 0.5)
        chosen = Scorer(scorer.routed, scorer.pattern, inputs, 1024, scorer.world)
        stored = StoredScorer(chosen, tmp_path, {})
        stored.score(prompts, pattern(4, [0, 2]))
        stored.score(prompts, policy)
    assert len(list(tmp_path.iterdir())) == 1 + len(looks)


def test_the_same_routers_that_look_elsewhere_do_not_share(
    scorer: Scorer, prompts: list[Encoded], tmp_path: Path
) -> None:
    policy = ThresholdPolicy(LayerRouter(4, 8), 0.5)
    for pool in ("ends:16", "tail:16", "ends:8"):
        inputs = parse_inputs([pool], [16, 32], [])
        chosen = Scorer(scorer.routed, scorer.pattern, inputs, 1024, scorer.world)
        StoredScorer(chosen, tmp_path, {}).score(prompts, policy)
    assert len(list(tmp_path.iterdir())) == 3


def test_each_pattern_and_size_has_a_place_of_its_own(
    scorer: Scorer, prompts: list[Encoded], tmp_path: Path
) -> None:
    policy = pattern(4, [0, 2])
    found = []
    for chosen in (
        make_pattern("streaming", 8, 32),
        make_pattern("triangle", 8, 32),
        triangle.Pattern(sink_tokens=8, window_tokens=32, tail_tokens=9),
        make_pattern("streaming", 4, 32),
    ):
        scorer.routed.detach()
        routed = RoutedModel(scorer.routed.model, chosen.sink_tokens, chosen.window_tokens)
        scorer = Scorer(routed, chosen, INPUTS, 1024, scorer.world)
        found.append(StoredScorer(scorer, tmp_path, {}).score(prompts, policy).surprise)
    assert len(list(tmp_path.glob("*.npz"))) == len(found) == 4
    assert all(not np.allclose(one, other) for one, other in itertools.combinations(found, 2))


def test_a_policy_without_identity_is_refused(
    scorer: Scorer, prompts: list[Encoded], tmp_path: Path
) -> None:
    class Unknown:
        def decide(self, features: torch.Tensor) -> torch.Tensor:
            return features

    with pytest.raises(TypeError, match="found Unknown"):
        StoredScorer(scorer, tmp_path, {}).score(prompts, Unknown())


def pieces(stored: StoredScorer, prompts: list[Encoded], policy: StaticPolicy) -> list[Path]:
    """Return where the scores of three prompts at a time lie."""
    keys = [stored._key(prompts[at : at + 3], policy) for at in (0, 3, 6)]
    return [stored.folder / f"{key}.npz" for key in keys]


def test_what_another_evaluation_has_begun_comes_last(
    scorer: Scorer, prompts: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be there by then; of one that was cut it is not, and is computed."""
    monkeypatch.setattr(stored_scores, "_PIECE", 3)
    policy = pattern(4, [0, 2])
    stored = StoredScorer(scorer, tmp_path, {})
    expected = stored.score(prompts, policy)
    first, *others = pieces(stored, prompts, policy)
    for path in (first, *others):
        path.unlink()
    first.with_suffix(".begun").touch()
    sizes: list[int] = []
    monkeypatch.setattr(
        scorer,
        "score",
        lambda chosen, *rest: sizes.append(len(chosen)) or Scorer.score(scorer, chosen, *rest),
    )
    found = stored.score(prompts, policy)
    assert sizes == [3, 1, 3]
    np.testing.assert_array_equal(found.score, expected.score)
    np.testing.assert_array_equal(found.sparse, expected.sparse)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz"] * 3


def test_a_mark_left_by_a_cut_is_not_waited_for(
    scorer: Scorer, prompts: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_scores, "_PIECE", 3)
    policy = pattern(4, [0, 2])
    stored = StoredScorer(scorer, tmp_path, {})
    for path in pieces(stored, prompts, policy):
        mark = path.with_suffix(".begun")
        mark.touch()
        os.utime(mark, (time.time() - 61, time.time() - 61))
    monkeypatch.setattr(stored_scores.time, "sleep", lambda seconds: pytest.fail("waits"))
    found = stored.score(prompts, policy)
    np.testing.assert_array_equal(found.score, scorer.score(prompts, policy).score)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz"}


def test_what_another_evaluation_ends_meanwhile_is_not_computed_again(
    scorer: Scorer, prompts: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that began together would otherwise do much of the work twice."""
    monkeypatch.setattr(stored_scores, "_PIECE", 3)
    policy = pattern(4, [0, 2])
    stored = StoredScorer(scorer, tmp_path, {})
    expected = stored.score(prompts, policy)
    last = pieces(stored, prompts, policy)[-1]
    content = last.read_bytes()
    last.unlink()
    last.with_suffix(".begun").touch()

    def end(seconds: float) -> None:  # the other's work, while this one sleeps
        last.write_bytes(content)
        last.with_suffix(".begun").unlink()

    monkeypatch.setattr(stored_scores.time, "sleep", end)
    before = scorer.tokens
    found = stored.score(prompts, policy)
    assert scorer.tokens == before
    np.testing.assert_array_equal(found.score, expected.score)
