"""Routers under a condition, against full attention under it; oracle: scores of a stand-in.

The stand-in answers by what it is asked, so that each number in the report can have one source.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.router.checkpoint import read_router, write_router
from flux_vllm.router.route import Route
from training.config import EvalConfig
from training.data.encoding import Encoded
from training.distributed import World
from training.evaluation import evaluate as module
from training.evaluation.prompts import PromptSet
from training.evaluation.scoring import Scores
from training.evaluation.statistics import Cells
from training.evaluation.variants import measure_variant, read_variant
from training.policies import Policy, StaticPolicy

TASKS = np.repeat(["needle", "multi_key", "list_end"], 40)
LENGTHS = np.tile([256, 512], 60)
CELLS = Cells(TASKS.tolist(), LENGTHS.tolist())


@pytest.mark.parametrize(
    "name", ["sideways", "chunks:64", "cached", "wrapper:paper", "plain:1", "wording:x"]
)
def test_an_unknown_variant_is_refused_before_anything_is_scored(
    name: str, config: EvalConfig
) -> None:
    config = dataclasses.replace(config, variants=("plain", name))
    with pytest.raises(ValueError, match=f"{name!r}; correct --variants"):
        module.Evaluation(config, World(0, 1, torch.device("cpu")))


def test_a_router_for_an_answers_first_tokens_is_refused(config: EvalConfig) -> None:
    router, info = read_router(Path(config.router))
    write_router(Path(config.router), router, dataclasses.replace(info, full_decode_tokens=32))
    with pytest.raises(ValueError, match="found 32, under which nothing is scored here"):
        module.Evaluation(config, World(0, 1, torch.device("cpu")))


class Router:
    def decide(self, features: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the stand-in scores by itself")


class StandIn:
    """Scores static routes and a router's with numbers of their own."""

    routed = SimpleNamespace(num_layers=4)

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.given: dict[str, Scores] = {}
        for how in ("full", "routed"):
            score, surprise, density = rng.random((3, len(TASKS)), dtype=np.float32)
            sparse = rng.integers(0, 2, (len(TASKS), 4)).astype(np.float32)
            self.given[how] = Scores(score, surprise, sparse, density)

    def score(self, prompts: Sequence[Encoded], policy: Policy) -> Scores:
        if isinstance(policy, StaticPolicy):
            assert policy.routes == [Route.FULL] * 4
            return self.given["full"]
        return self.given["routed"]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("plain", {}),
        ("begun", {"begun": True}),
        ("wording", {"held_out_wording": True}),
        ("wrapper:dialogue", {"wrapper": "dialogue"}),
    ],
)
def test_a_variant_is_compared_with_full_attention_on_its_own_prompts(
    name: str, setting: dict[str, Any]
) -> None:
    asked: list[dict[str, Any]] = []

    def make(**given: Any) -> PromptSet:
        asked.append(given)
        ids = np.zeros(9, dtype=np.int32)
        return PromptSet([Encoded(task, ids, 8, 4) for task in TASKS], LENGTHS.tolist())

    scorer = StandIn()
    report, by_prompt = measure_variant(read_variant(name), make, scorer, Router())  # type: ignore[arg-type]
    full, routed = scorer.given["full"], scorer.given["routed"]
    assert asked == [setting]
    assert report["score"] == CELLS.overall(routed.score)
    assert report["of_full"] == CELLS.overall(routed.score) / CELLS.overall(full.score)
    assert report["share"] == CELLS.overall(routed.sparse.mean(axis=1))
    expected = {
        "task": TASKS,
        "length": LENGTHS,
        "full": full.score,
        "router": routed.score,
        "share": routed.sparse.mean(axis=1),
    }
    assert set(by_prompt) == {f"{name}/{key}" for key in expected}
    for key, array in expected.items():
        np.testing.assert_array_equal(by_prompt[f"{name}/{key}"], array)


def test_variants_are_kept_by_prompt(config: EvalConfig) -> None:
    pytest.importorskip("matplotlib")
    data = dataclasses.replace(config.data, tasks=("needle", "repeat_end", "arithmetic"))
    variants = ("plain", "begun")
    config = dataclasses.replace(config, data=data, variants=variants, shares=())
    report = module.evaluate(config)["variants"]
    with np.load(Path(config.out) / "scores.npz") as stored:
        for name in variants:
            tasks = stored[f"{name}/task"].tolist()
            cells = Cells(tasks, stored[f"{name}/length"].tolist())
            assert len(tasks) == 3 * 2 * config.variant_prompts
            for kind, key in (("router", "score"), ("share", "share")):
                assert cells.overall(stored[f"{name}/{kind}"]) == report[name][key]
    for name in variants:
        assert report[name]["prompts"] == config.variant_prompts
        assert "reasoning" in report[name]["score_by_group"]
