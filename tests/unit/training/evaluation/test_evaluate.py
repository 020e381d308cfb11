"""A whole evaluation on a tiny model, and its statistics against plain NumPy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.patterns import make_pattern
from flux_vllm.router.checkpoint import read_router, write_router
from flux_vllm.router.inputs import parse_inputs
from tests.unit.training.own_model import own_features
from training import recipes
from training.config import EvalConfig
from training.data.batching import collate
from training.data.encoding import Encoded
from training.distributed import World
from training.evaluation import evaluate as module
from training.evaluation.compare_patterns import mean_density
from training.evaluation.evaluate import choose_thresholds, evaluate
from training.evaluation.prompts import write_prompts
from training.evaluation.report import join_runs, plot_seeds
from training.evaluation.scoring import Scorer, Scores
from training.evaluation.static_patterns import pattern
from training.evaluation.statistics import Cells, interval
from training.policies import StaticPolicy, ThresholdPolicy


def test_evaluate_writes_figures_and_plots(config: EvalConfig) -> None:
    pytest.importorskip("matplotlib")
    report = evaluate(config)
    written = json.loads((Path(config.out) / "quality.json").read_text())
    for name in ("full_score", "all_sparse_score", "share_local", "share_retrieval", "points"):
        assert name in written
    for point in written["points"]:
        assert {"threshold", "share", "router_score", "static_score"} <= point.keys()
        assert "least_shares" in point
        assert {"router_retrieval", "static_retrieval"} <= point.keys()
        assert "router-static" in point["retrieval_intervals"]
        assert point["static_share"] <= point["share"] + 1e-6
    assert set(written["variants"]) == set(config.variants)
    assert len(written["heat_map"]["needle"]) == 4
    assert written["provenance"]["router"]["training"]["config"]["seed"] == 7
    assert {path.name for path in Path(config.out).glob("*.png")} == {"curve.png", "heat_map.png"}
    assert sorted(report["static_patterns"]["order"]) == [0, 1, 2, 3]


PATTERNS = ("streaming", "triangle", "xattention")


def test_patterns_are_compared_on_the_same_prompts(config: EvalConfig) -> None:
    pytest.importorskip("matplotlib")
    config = dataclasses.replace(config, patterns=PATTERNS, variants=(), shares=())
    report = evaluate(config)
    assert tuple(report["patterns"]) == PATTERNS
    own = report["patterns"]["streaming"]
    assert own["score"] == report["default"]["score"]
    assert own["all_sparse_score"] == report["all_sparse_score"]
    for found in report["patterns"].values():
        assert {"score", "score_by_group", "of_full", "share", "intervals"} <= found.keys()
        assert 0 < found["all_sparse_density"] <= 1
    densities = [report["patterns"][name]["all_sparse_density"] for name in PATTERNS]
    assert densities[0] < densities[1] <= 1
    assert (Path(config.out) / "patterns.png").exists()
    joined = join_runs([Path(config.out) / "quality.json"] * 2)
    assert joined["patterns"]["triangle"]["runs"] == 2
    again = evaluate(dataclasses.replace(config, patterns=()))
    assert again["patterns"] == {"streaming": own}


@pytest.mark.parametrize("name", ["triangle", "xattention"])
def test_a_router_is_evaluated_under_its_own_pattern(name: str, config: EvalConfig) -> None:
    router, info = read_router(Path(config.router))
    write_router(Path(config.router), router, dataclasses.replace(info, sparse_pattern=name))
    evaluation = module.Evaluation(config, World(0, 1, torch.device("cpu")))
    prompts, policy = evaluation.test.prompts, pattern(4, [0, 1, 2, 3])
    found = evaluation.scorer.score(prompts, policy)
    routed = evaluation.routed
    chosen = make_pattern(name, 8, 32)
    inputs = info.inputs
    expected = Scorer(routed, chosen, inputs, 1024, evaluation.world).score(prompts, policy)
    streaming = Scorer(routed, make_pattern("streaming", 8, 32), inputs, 1024, evaluation.world)
    np.testing.assert_allclose(found.surprise, expected.surprise, rtol=1e-3)
    assert not np.allclose(found.surprise, streaming.score(prompts, policy).surprise, rtol=1e-3)


def test_density_is_that_of_the_sparse_layers(config: EvalConfig) -> None:
    scorer = module.Evaluation(config, World(0, 1, torch.device("cpu"))).scorer
    prompts = module.Evaluation(config, scorer.scorer.world).test.prompts
    assert np.isnan(scorer.score(prompts, StaticPolicy.all_full(4)).density).all()
    found = scorer.score(prompts, pattern(4, [2])).density
    for prompt, density in zip(prompts, found, strict=True):
        keys = [min(position + 1, 8 + 32) for position in range(prompt.prompt_len)]
        assert density == pytest.approx(sum(keys) * 2 / prompt.prompt_len / (prompt.prompt_len + 1))


def test_a_pattern_of_other_sizes_is_refused(config: EvalConfig) -> None:
    evaluation = module.Evaluation(config, World(0, 1, torch.device("cpu")))
    with pytest.raises(ValueError, match=r"\(8, 32\), found .*window_tokens=64"):
        Scorer(
            evaluation.routed,
            make_pattern("triangle", 8, 64),
            evaluation.info.inputs,
            1,
            evaluation.world,
        )


@pytest.mark.parametrize("kind", ["own", "old"])
def test_a_router_sees_what_its_file_says(kind: str, config: EvalConfig) -> None:
    """Against transformers' own code over the prompts' ends; an old file names one pool."""
    _, info = read_router(Path(config.router))
    if kind == "old":
        more = {"pools": (), "context_layers": (), "widths": (), "pool_prefix": False}
        info = dataclasses.replace(info, **more)
        write_router(Path(config.router), info.make_router(), info)
    evaluation = module.Evaluation(config, World(0, 1, torch.device("cpu")))
    prompts = evaluation.test.prompts[::5]
    seen = features_seen(evaluation.scorer.scorer, prompts)
    evaluation.routed.detach()
    pool = {"own": ("tail:16", "head:8"), "old": ("tail:16",)}[kind]
    inputs = parse_inputs(pool, (16, 32), (3,) if kind == "own" else ())
    expected = [
        own_features(
            evaluation.routed.model,
            torch.tensor(prompt.token_ids[: prompt.prompt_len]).long(),
            inputs,
        )
        for prompt in prompts
    ]
    torch.testing.assert_close(seen, torch.stack(expected, dim=1), rtol=1e-3, atol=1e-3)


def test_scores_by_prompt_are_written_for_every_point(config: EvalConfig) -> None:
    pytest.importorskip("matplotlib")
    report = evaluate(dataclasses.replace(config, variants=(), shares=(0.0, 0.6)))
    with np.load(Path(config.out) / "scores.npz") as stored:
        cells = Cells(stored["task"].tolist(), stored["length"].tolist())
        assert cells.overall(stored["full"]) == pytest.approx(report["full_score"])
        for point in report["points"]:
            for kind, name in (("router", "router_score"), ("share", "share")):
                values = stored[f"{kind}@{point['threshold']}"]
                assert cells.overall(values) == pytest.approx(point[name])


def test_given_thresholds_are_scored_as_points(config: EvalConfig) -> None:
    pytest.importorskip("matplotlib")
    config = dataclasses.replace(config, variants=(), shares=(0.6,))
    chosen = evaluate(config)["points"]
    least = next(point["threshold"] for point in chosen if point["least_shares"])
    both = evaluate(dataclasses.replace(config, score_thresholds=(0.45, least, 0.45)))
    found = {point["threshold"]: point for point in both["points"]}
    assert len(found) == len(both["points"]) == len(chosen) + 1
    assert found[least]["least_shares"] == [0.6]
    assert found[0.45]["least_shares"] == []
    assert [point for point in both["points"] if point["threshold"] != 0.45] == chosen


def by_surprise(score: Any) -> Any:
    """Let scores tell the policies of a random model apart, which answers nothing right."""

    def scored(*given: Any) -> Scores:
        found = score(*given)
        return dataclasses.replace(found, score=np.exp(-found.surprise))

    return scored


def test_given_thresholds_are_scored_where_none_is_chosen(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Scorer, "score", by_surprise(Scorer.score))
    config = dataclasses.replace(config, variants=(), shares=(), score_thresholds=(0.45,))
    report = evaluate(config)
    assert {point["threshold"]: point["least_shares"] for point in report["points"]} == {
        0.45: [],
        0.5: [],
    }
    assert report["static_patterns"]["validation_thresholds"] == {}
    evaluation = module.Evaluation(config, World(0, 1, torch.device("cpu")))
    prompts = evaluation.test.prompts
    routed = evaluation.scorer.score(prompts, ThresholdPolicy(evaluation.router, 0.45))
    with np.load(Path(config.out) / "scores.npz") as stored:
        np.testing.assert_array_equal(stored["router@0.45"], routed.score)
        for point in report["points"]:
            layers = int(4 * point["share"] + 1e-3)
            layout = report["static_patterns"][str(layers)]["layers"]
            static = evaluation.scorer.score(prompts, pattern(4, layout))
            np.testing.assert_array_equal(stored[f"static@{layers}"], static.score)
            cells = evaluation.test.cells
            assert cells.overall(stored[f"static@{layers}"]) == point["static_score"]
    assert evaluate(dataclasses.replace(config, score_thresholds=()))["points"] == []


def test_given_thresholds_are_scored_alone(config: EvalConfig, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = dataclasses.replace(config, variants=(), shares=(), score_thresholds=(0.45,))
    beside = {point["threshold"]: point for point in evaluate(config)["points"]}
    report = evaluate(dataclasses.replace(config, validation_prompts=0))
    assert "static_patterns" not in report
    for point in report["points"]:
        same = beside.pop(point["threshold"])
        assert {name for name in same if "static" in name} == {
            "static_share", "static_score", "static_retrieval", "static_local"
        }  # fmt: skip
        for name in point.keys() - {"intervals", "retrieval_intervals"}:
            assert point[name] == same[name]
        assert same["intervals"].items() >= point["intervals"].items()
    assert not beside
    joined = join_runs([Path(config.out) / "quality.json"])
    assert [point["router_score"] for point in joined["points"]] == [
        point["router_score"] for point in report["points"]
    ]
    assert "router-full" in report["points"][0]["retrieval_intervals"]
    plot_seeds(tmp_path / "seeds.png", joined)


@pytest.mark.parametrize("lengths", [(), (512,)])
def test_validation_lengths_are_the_tests_unless_given(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    pytest.importorskip("matplotlib")
    made = module.make_prompts
    found = {}

    def note(data: Any, tokenizer: Any, setting: Any, limit: int) -> Any:
        found[setting.split] = setting.lengths
        return made(data, tokenizer, setting, limit)

    assert recipes.evaluation().validation_lengths == ()
    monkeypatch.setattr(module, "make_prompts", note)
    config = dataclasses.replace(config, variants=(), validation_lengths=lengths)
    evaluate(config)
    wanted = lengths or config.lengths
    assert found == {"test": config.lengths, "validation": wanted, "train": wanted}


def test_a_static_pattern_of_ones_own(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Scorer, "score", by_surprise(Scorer.score))
    config = dataclasses.replace(config, variants=(), shares=(), static_layers=(3, 1))
    static = evaluate(config)["static"]
    assert static["layers"] == [1, 3]
    assert static["share"] == 0.5
    evaluation = module.Evaluation(config, World(0, 1, torch.device("cpu")))
    prompts, cells = evaluation.test.prompts, evaluation.test.cells
    scores = evaluation.scorer.score(prompts, pattern(4, [1, 3])).score
    assert static["score"] == cells.overall(scores)
    assert static["score"] != cells.overall(
        evaluation.scorer.score(prompts, pattern(4, [0, 2])).score
    )
    with np.load(Path(config.out) / "scores.npz") as stored:
        np.testing.assert_array_equal(stored["static"], scores)
    assert static["intervals"].keys() >= {"full", "static"}
    with pytest.raises(ValueError, match=r"static_layers among the layers.*found \[-1, 4\]"):
        evaluate(dataclasses.replace(config, static_layers=(4, 0, -1)))


def test_scores_do_not_depend_on_batching(config: EvalConfig) -> None:
    evaluation = module.Evaluation(config, World(0, 1, torch.device("cpu")))
    prompts = evaluation.test.prompts
    policy = ThresholdPolicy(evaluation.router, 0.5)
    together = evaluation.scorer.score(prompts, policy)
    streaming = make_pattern("streaming", 8, 32)
    alone = Scorer(evaluation.routed, streaming, evaluation.info.inputs, 1, evaluation.world).score(
        prompts, policy
    )
    np.testing.assert_allclose(together.score, alone.score)
    np.testing.assert_allclose(together.surprise, alone.surprise, rtol=1e-3)
    np.testing.assert_array_equal(together.sparse, alone.sparse)


def test_static_patterns_report_their_layers(config: EvalConfig) -> None:
    evaluation = module.Evaluation(config, World(0, 1, torch.device("cpu")))
    prompts = evaluation.test.prompts
    scores = evaluation.scorer.score(prompts, pattern(4, [1, 3]))
    assert (scores.sparse == np.array([0, 1, 0, 1])).all()
    full = evaluation.scorer.score(prompts, StaticPolicy.all_full(4))
    assert (full.sparse == 0).all()
    assert not np.allclose(full.surprise, scores.surprise)


def test_write_prompts_gives_the_evaluated_prompts(config: EvalConfig, tokenizer: Any) -> None:
    rows = [json.loads(line) for line in write_prompts(config).open()]
    evaluated = module.Evaluation(config, World(0, 1, torch.device("cpu"))).test.prompts
    assert len(rows) == len(evaluated) == 12
    for row, prompt in zip(rows, evaluated, strict=True):
        assert tokenizer([row["prompt"]])["input_ids"][0] == (
            prompt.token_ids[: prompt.prompt_len].tolist()
        )
        assert row["task"] == prompt.task


def features_seen(scorer: Scorer, prompts: list[Encoded]) -> torch.Tensor:
    """Return the routers' inputs [L, P, F], each prompt scored by itself."""
    seen = []

    class Recorder:
        def decide(self, features: torch.Tensor) -> torch.Tensor:
            seen.append(features)
            return torch.ones(features.shape[:2])

    for prompt in prompts:
        scorer.score([prompt], Recorder())
    return torch.cat(seen, dim=1)


def test_open_prompts_are_routed_without_the_prefix_and_scored_after_it(
    config: EvalConfig, tokenizer: Any
) -> None:
    evaluation = module.Evaluation(config, World(0, 1, torch.device("cpu")))
    opened = evaluation.test.prompts
    begun = evaluation._prompts("test", config.prompts, config.lengths, begun=True).prompts
    rows = [json.loads(line) for line in write_prompts(config).open()]
    for row, one, other in zip(rows, opened, begun, strict=True):
        prefix = tokenizer([row["prefix"]])["input_ids"][0]
        assert one.prefix_len == len(prefix) > 0
        assert other.token_ids[other.prompt_len - len(prefix) : other.prompt_len].tolist() == prefix
        assert one.token_ids[: one.prompt_len + len(prefix)].tolist() == (
            other.token_ids[: other.prompt_len].tolist()
        )
    full = StaticPolicy.all_full(4)
    micro = collate(opened, list(range(12)), evaluation.info.inputs, skip_prefix=True)
    for at, prompt in enumerate(opened):
        own = prompt.token_ids[prompt.prompt_len + prompt.prefix_len :].tolist()
        assert micro.answer_tokens[micro.answer_rows == at].tolist() == own
    # Under fixed routes both forms are the same text with the same tokens scored.
    surprises = [evaluation.scorer.score(form, full).surprise for form in (opened, begun)]
    np.testing.assert_allclose(*surprises, rtol=1e-3)
    # What routers see does not change with the forced words, and does where prompts hold them.
    changed = []
    for prompt in opened:
        ids = prompt.token_ids.copy()
        ids[prompt.prompt_len : prompt.prompt_len + prompt.prefix_len] = 7
        changed.append(dataclasses.replace(prompt, token_ids=ids))
    seen = [features_seen(evaluation.scorer.scorer, form) for form in (opened, changed, begun)]
    torch.testing.assert_close(seen[0], seen[1])
    assert (seen[0] - seen[2]).abs().max() > 0.01


def test_choose_thresholds_takes_the_lowest_that_reaches_each_share() -> None:
    tried = {0.9: (0.8, 0.85), 0.1: (0.5, 0.9), 0.3: (0.6, 0.8), 0.5: (0.7, 0.86)}
    assert choose_thresholds(tried, (0.6, 0.75)) == {0.3: [0.6], 0.5: [], 0.9: [0.75]}
    assert choose_thresholds(tried, (0.65, 0.7)) == {0.5: [0.65, 0.7]}
    assert choose_thresholds(tried, (0.95,)) == {0.5: []}
    assert choose_thresholds(tried, (0.6,), (0.3, 0.2)) == {0.2: [], 0.3: [0.6], 0.5: []}
    assert choose_thresholds({}, (), (0.7, 0.7)) == {0.5: [], 0.7: []}


def test_overall_weighs_groups_and_cells_equally() -> None:
    tasks = ["needle"] * 3 + ["multi_key"] + ["repeat_end"] * 2
    values = np.array([1.0, 1.0, 1.0, 0.0, 0.2, 0.4])
    cells = Cells(tasks, [256] * 6)
    assert cells.by_group(values) == pytest.approx({"retrieval": 0.5, "local": 0.3})
    assert cells.overall(values) == pytest.approx(0.4)


def test_interval_is_paired() -> None:
    rng = np.random.default_rng(0)
    full = rng.random(400)
    values = {"full": full, "router": full - 0.1, "noisy": rng.random(400)}
    found = interval(Cells(["needle"] * 400, [256] * 400), values, "overall")
    assert found["router-full"] == pytest.approx([-0.1, -0.1], abs=1e-3)
    low, high = found["full"]
    error = 1.96 * full.std() / 20
    assert (low, high) == pytest.approx((full.mean() - error, full.mean() + error), abs=0.01)
    assert found["noisy-full"][1] - found["noisy-full"][0] > 0.05


def test_density_is_weighed_as_scores_are() -> None:
    # Prompts too short for anything but full density do not count: their group is not judged.
    tasks = ["needle", "needle", "repeat_end", "arithmetic", "arithmetic"]
    cells = Cells(tasks, [1536] * 5)
    density = np.array([0.2, np.nan, 0.6, 1.0, 1.0], dtype=np.float32)
    scores = Scores(density, density, np.zeros((5, 1), np.float32), density)
    assert mean_density(cells, scores) == pytest.approx(0.4)
    nowhere = dataclasses.replace(scores, density=np.full(5, np.nan, np.float32))
    assert mean_density(cells, nowhere) is None
