"""Routers under a condition, against the same prompts without it; oracle: scores of a stand-in.

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

from training.config import EvalConfig
from training.data.encoding import Encoded
from training.distributed import World
from training.evaluation import evaluate as module
from training.evaluation.prompts import PromptSet
from training.evaluation.scoring import Condition, Scores
from training.evaluation.statistics import Cells, interval
from training.evaluation.variants import measure_variant, read_variant
from training.policies import Policy, StaticPolicy

TASKS = np.repeat(["needle", "multi_key", "list_end"], 40)
LENGTHS = np.tile([256, 512], 60)
CELLS = Cells(TASKS.tolist(), LENGTHS.tolist())


@pytest.mark.parametrize(
    "name", ["sideways", "chunks:0", "chunks:many", "wrapper:paper", "plain:1", "cached:2"]
)
def test_an_unknown_variant_is_refused_before_anything_is_scored(
    name: str, config: EvalConfig
) -> None:
    config = dataclasses.replace(config, variants=("plain", name))
    with pytest.raises(ValueError, match=f"{name!r}; correct --variants"):
        module.Evaluation(config, World(0, 1, torch.device("cpu")))


class Router:
    def decide(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the stand-in scores by itself")


class StandIn:
    """Scores `kind` of prompts under a policy and a condition with numbers of their own."""

    routed = SimpleNamespace(num_layers=4)

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.given: dict[tuple[str, str], Scores] = {}
        for kind in ("asked", "before"):
            for how in ("full", "whole", "chunks of 64", "cached"):
                score, surprise, density = rng.random((3, len(TASKS)), dtype=np.float32)
                sparse = rng.integers(0, 2, (len(TASKS), 4)).astype(np.float32)
                self.given[kind, how] = Scores(score, surprise, sparse, density)

    def score(
        self, prompts: Sequence[Encoded], policy: Policy, condition: Condition | None = None
    ) -> Scores:
        condition = condition or Condition()
        kind = "before" if prompts[0].prefix_len else "asked"
        how = "whole"
        if isinstance(policy, StaticPolicy):
            how = "full"
        elif condition.cached is not None:
            assert condition.cached is self.given["before", "whole"]
            how = "cached"
        elif condition.chunk_tokens is not None:
            how = f"chunks of {condition.chunk_tokens}"
        return self.given[kind, how]


def make(**setting: Any) -> PromptSet:
    assert setting.get("same_context", False) or not setting
    ids = np.zeros(9, dtype=np.int32)
    local = int(setting.get("ask_locally", False))
    return PromptSet([Encoded(task, ids, 8, 4, local) for task in TASKS], LENGTHS.tolist())


@pytest.mark.parametrize(
    ("name", "how", "without"),
    [("chunks:64", "chunks of 64", "one_chunk"), ("cached", "cached", "alone")],
)
def test_a_condition_is_compared_with_the_same_prompts_without_it(
    name: str, how: str, without: str
) -> None:
    scorer = StandIn()
    report, by_prompt = measure_variant(read_variant(name), make, scorer, Router())  # type: ignore[arg-type]
    full, routed, plain = (scorer.given["asked", one] for one in ("full", how, "whole"))
    assert report["score"] == CELLS.overall(routed.score)
    assert report["of_full"] == CELLS.overall(routed.score) / CELLS.overall(full.score)
    found = report[without]
    assert found["score"] == CELLS.overall(plain.score)
    assert found["score_by_group"] == CELLS.by_group(plain.score)
    assert found["share"] == CELLS.overall(plain.sparse.mean(axis=1))
    assert found["share_by_group"] == CELLS.by_group(plain.sparse.mean(axis=1))
    values = {without: plain.score, "router": routed.score}
    for key, statistic in (("intervals", "overall"), ("retrieval_intervals", "retrieval")):
        assert found[key] == interval(CELLS, values, statistic)
        assert f"router-{without}" in found[key]
    expected = {
        "task": TASKS,
        "length": LENGTHS,
        "full": full.score,
        "router": routed.score,
        "share": routed.sparse.mean(axis=1),
        without: plain.score,
    }
    assert set(by_prompt) == {f"{name}/{key}" for key in expected}
    for key, array in expected.items():
        np.testing.assert_array_equal(by_prompt[f"{name}/{key}"], array)


def test_a_variant_without_a_condition_is_compared_with_full_attention_alone() -> None:
    scorer = StandIn()
    report, by_prompt = measure_variant(read_variant("plain"), make, scorer, Router())  # type: ignore[arg-type]
    assert report["score"] == CELLS.overall(scorer.given["asked", "whole"].score)
    assert not {"one_chunk", "alone"} & report.keys()
    kept = ("task", "length", "full", "router", "share")
    assert set(by_prompt) == {f"plain/{name}" for name in kept}


def test_variants_are_kept_by_prompt(config: EvalConfig) -> None:
    pytest.importorskip("matplotlib")
    data = dataclasses.replace(config.data, tasks=("needle", "repeat_end", "arithmetic"))
    variants = ("plain", "chunks:64", "cached")
    config = dataclasses.replace(config, data=data, variants=variants, shares=())
    report = module.evaluate(config)["variants"]
    with np.load(Path(config.out) / "scores.npz") as stored:
        for name in variants:
            tasks = stored[f"{name}/task"].tolist()
            assert ("arithmetic" in tasks) == (name != "cached")
            cells = Cells(tasks, stored[f"{name}/length"].tolist())
            for kind, key in (("router", "score"), ("share", "share")):
                assert cells.overall(stored[f"{name}/{kind}"]) == report[name][key]
        np.testing.assert_array_equal(stored["chunks:64/one_chunk"], stored["plain/router"])
        assert len(stored["cached/alone"]) == 2 * 2 * 2
    assert report["chunks:64"]["one_chunk"]["score"] == report["plain"]["score"]
    assert "reasoning" not in report["cached"]["score_by_group"]
    assert "reasoning" in report["plain"]["score_by_group"]


def test_one_chunk_costs_nothing_beside_plain(config: EvalConfig) -> None:
    config = dataclasses.replace(config, variants=("plain",))
    evaluation = module.Evaluation(config, World(0, 1, torch.device("cpu")))
    evaluation.variant(read_variant("plain"))
    before = evaluation.scorer.scorer.tokens
    evaluation.variant(read_variant("chunks:64"))
    # Full attention and the whole prompts are there; what is left is the router in chunks, one
    # pass of the two that `plain` took.
    assert evaluation.scorer.scorer.tokens - before == before / 2
