"""What is measured, and a whole run. Oracle: the divergence meter; finite differences of it."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.patterns import make_pattern
from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.inputs import parse_inputs
from tests.unit.training.runs import SINK, WINDOW
from training import trainer
from training.attach import RoutedModel
from training.costs import train as costs_train
from training.costs.measure import Measurer, PlacedPrompt, leads, measure_into
from training.costs.measurements import Measurements, join, open_folder, read_folder
from training.costs.quadratic import fit_costs
from training.data.batching import DenseQueries
from training.data.encoding import Encoded
from training.evaluation.divergence import DivergenceMeter
from training.policies import StaticPolicy
from training.recipes import tiny

INPUTS = parse_inputs(["tail:1", "tail:4", "length"], [8, 16], [1, 3])
ANSWER = 5


@pytest.fixture
def routed(tiny_model: Callable[..., Any]) -> RoutedModel:
    return RoutedModel(tiny_model("qwen2"), SINK, WINDOW)


def make_prompts(count: int = 5) -> list[Encoded]:
    rng = np.random.default_rng(0)
    lens = rng.integers(60, 150, count)
    return [
        Encoded("", rng.integers(1, 256, length + ANSWER).astype(np.int32), int(length), 0)
        for length in lens
    ]


def measurer(routed: RoutedModel, seed: int = 0) -> Measurer:
    return Measurer(routed, INPUTS, 128, DenseQueries(12, 3), 512, seed)


def by_place(part: Measurements) -> Measurements:
    return part.take(np.argsort(part.place))


def test_nats_are_the_divergence_meters(routed: RoutedModel) -> None:
    prompts = make_prompts()
    part = by_place(measurer(routed).measure(prompts, np.arange(5), np.zeros(5, bool)))
    pattern = make_pattern("triangle", SINK, WINDOW, {"tail_tokens": 12})
    meter = DivergenceMeter(routed, INPUTS, pattern, 128, 512, full_decode_tokens=3)
    for at, prompt in enumerate(prompts):
        for sample in range(2):
            layers = part.sparse[at, sample].nonzero()[0].tolist()
            policy = StaticPolicy.with_sparse(4, layers)
            expected = meter.measure([prompt], {"it": policy})["it"].nats[0]
            assert part.nats[at, sample] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert part.sparse[:, 0].all()
    assert not part.sparse[:, 1].all()
    assert part.tokens.tolist() == [prompt.prompt_len for prompt in prompts]


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_routes_are_sampled_for_a_share_of_the_prompts(routed: RoutedModel, share: float) -> None:
    """The rest is measured all SPARSE, to the same numbers, and costs are fitted to both."""
    prompts, places, held_out = make_prompts(20), np.arange(20), np.zeros(20, bool)
    whole = by_place(measurer(routed).measure(prompts, places, held_out))
    one_by_one = Measurer(routed, INPUTS, 128, DenseQueries(12, 3), 1, seed=0, sampled_share=share)
    part = by_place(one_by_one.measure(prompts, places, held_out))
    sampled = ~np.isnan(part.nats[:, 1])
    assert sampled.sum() == round(20 * share)
    assert (~np.isnan(part.slopes[:, 1])).all(-1).tolist() == sampled.tolist()
    np.testing.assert_allclose(part.nats[:, 0], whole.nats[:, 0], rtol=1e-3, atol=1e-6)
    costs = fit_costs(part, steps=400)
    predicted = costs.nats(torch.ones(20, 4)).numpy()
    assert np.abs(np.log((predicted + 2e-3) / (part.nats[:, 0] + 2e-3))).mean() < 0.3
    assert torch.isfinite(leads(part)).all()


def test_slopes_are_those_of_mixed_routes(routed: RoutedModel) -> None:
    """A small step of one layer's mixture, computed by the model."""
    (prompt,) = prompts = make_prompts(1)
    part = measurer(routed, seed=2).measure(prompts, np.arange(1), np.zeros(1, bool))
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    tail = torch.zeros(1, len(prompt), dtype=torch.bool)
    tail[:, prompt.prompt_len - 12 : prompt.prompt_len + 3] = True
    at = slice(prompt.prompt_len - 1, len(prompt) - 1)

    def nats(sparse: torch.Tensor) -> float:
        routes = (1 - sparse)[:, None].requires_grad_(True)
        ours = routed.logits(routed.forward(ids, routes, tail)[0, at]).log_softmax(-1)
        with torch.no_grad():
            full = routed.logits(routed.forward(ids, torch.ones(4, 1))[0, at]).log_softmax(-1)
        return float((full.exp() * (full - ours)).sum(-1).mean().detach())

    sparse = torch.from_numpy(part.sparse[0, 1]).float()
    for layer in range(4):
        step = torch.zeros(4)
        step[layer] = 1e-2
        expected = (nats(sparse + step) - nats(sparse - step)) / 2e-2
        assert part.slopes[0, 1, layer] == pytest.approx(expected, rel=0.1, abs=2e-5)
    assert np.isnan(part.slopes[0, 0]).all()


def test_pools_are_the_probes(routed: RoutedModel) -> None:
    prompts = make_prompts()
    part = by_place(measurer(routed).measure(prompts, np.arange(5), np.zeros(5, bool)))
    assert part.pooled.shape == (5, 4, 3, 8)
    lens = np.array([prompt.prompt_len for prompt in prompts])
    expected = np.log2(lens / 16384).astype(np.float16)
    assert (part.pooled[:, :, 2] == expected[:, None, None]).all()


def test_samples_lean_to_layers_that_matter(routed: RoutedModel) -> None:
    part = measurer(routed).measure(make_prompts(), np.arange(5), np.zeros(5, bool))
    part.slopes[:, 1] = [1e-4, 1e-4, 1.0, 1e-3]
    part.nats[:, 1] = 0.1
    lead = leads(part)
    assert lead.argmax() == 2
    one = measurer(routed)
    one.lean(part)
    share = one._sample(4000).mean(dim=1)
    assert share[2] > share[3] > share[0]
    assert 0.2 < float(share.mean()) < 0.8


def test_files_survive_and_are_not_measured_again(routed: RoutedModel, tmp_path: Path) -> None:
    items = [PlacedPrompt(place, place == 3, prompt) for place, prompt in enumerate(make_prompts())]
    known = open_folder(tmp_path, {"model": "m"})
    measure_into(tmp_path, measurer(routed), items[:3], known, 0.0)
    again = open_folder(tmp_path, {"model": "m"})
    assert sorted(join(again).place) == [0, 1, 2]
    measure_into(tmp_path, measurer(routed), items[3:], again, 0.0)
    whole = join(read_folder(tmp_path))
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*.npz")} == {0o644}
    assert sorted(whole.place) == [0, 1, 2, 3, 4]
    assert whole.place[whole.held_out].tolist() == [3]
    # Reading leaves what the folder says of itself.
    assert json.loads((tmp_path / "measured.json").read_text()) == {"model": "m"}
    with pytest.raises(ValueError, match="measurements of the same model"):
        open_folder(tmp_path, {"model": "other"})


@pytest.mark.parametrize(("share", "expected"), [(0.5, r"samples \d"), (0.0, "no samples")])
def test_prompts_without_a_sample_do_not_count_in_what_is_said(
    routed: RoutedModel, tmp_path: Path, capsys: Any, share: float, expected: str
) -> None:
    items = [PlacedPrompt(place, False, prompt) for place, prompt in enumerate(make_prompts())]
    one = measurer(routed)
    one.sampled_share, one.due = share, share * 2
    measure_into(tmp_path, one, items, open_folder(tmp_path, {}), 0.0)
    said = capsys.readouterr().err
    assert re.search(expected, said), said
    assert "nan" not in said
    assert np.isnan(join(read_folder(tmp_path)).nats[:, 1:]).any() == (share > 0)


def test_measurements_with_fewer_samples_are_joined(routed: RoutedModel) -> None:
    part = measurer(routed).measure(make_prompts(), np.arange(5), np.zeros(5, bool))
    fewer = Measurements(
        part.pooled,
        part.sparse[:, :1],
        part.nats[:, :1],
        part.slopes[:, :1],
        part.tokens,
        part.place + 5,
        part.held_out,
    )
    joined = join([part, fewer])
    assert joined.nats.shape == (10, 2)
    assert np.isnan(joined.nats[5:, 1]).all()
    with pytest.raises(ValueError, match="expected measurements of one model"):
        join([part, Measurements(part.pooled[:, :2], *_rest(part))])


def _rest(part: Measurements) -> list[np.ndarray]:
    return [part.sparse, part.nats, part.slopes, part.tokens, part.place, part.held_out]


@pytest.fixture
def config(tmp_path: Path, tiny_model: Callable[..., Any], tokenizer: Any, monkeypatch: Any) -> Any:
    rng = np.random.default_rng(1)
    lines = [
        json.dumps(
            {
                "prompt": " ".join(map(str, rng.integers(0, 99, rng.integers(20, 90)))),
                "answer": "so it is said",
            }
        )
        for _ in range(40)
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    loaded: list[str] = []

    def load(model: str, sink: int, window: int, *rest: Any) -> RoutedModel:
        loaded.append(model)
        return RoutedModel(tiny_model("qwen2"), sink, window)

    monkeypatch.setattr(costs_train, "load_routed", load)
    monkeypatch.setattr(costs_train, "load_tokenizer", lambda model: tokenizer)
    monkeypatch.setattr(costs_train, "model_limit", lambda model: 4096)
    settings = tiny("m", str(tmp_path / "out"))
    return dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, files=(str(tmp_path / "answers.jsonl"),)),
        router=dataclasses.replace(settings.router, sink_tokens=SINK, window_tokens=WINDOW),
        optimizer=dataclasses.replace(settings.optimizer, steps=20),
    ), loaded


def test_a_run_is_measured_once_and_fitted_again(config: Any, tmp_path: Path) -> None:
    settings, loaded = config
    file = trainer.train(settings)
    router, info = read_router(file)
    assert (info.sink_tokens, info.window_tokens, info.num_layers) == (SINK, WINDOW, 4)
    assert info.context_layers
    assert sorted(info.freeing_order) == [0, 1, 2, 3]
    report = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert [row["threshold"] for row in report["rows"]] == sorted(costs_train._THRESHOLDS)
    measured = join(read_folder(tmp_path / "out" / "measurements"))
    assert (measured.tokens > SINK + WINDOW).all()
    assert loaded == ["m"]
    budget = dataclasses.replace(settings.loss, budget_nats=10.0)
    trainer.train(dataclasses.replace(settings, loss=budget))
    assert loaded == ["m"]
    assert len(join(read_folder(tmp_path / "out" / "measurements"))) == len(measured)
    again, _ = read_router(file)
    assert not torch.equal(again.linear("head.4")[1], router.linear("head.4")[1])


def test_another_run_fits_to_what_a_first_one_measured(config: Any, tmp_path: Path) -> None:
    """Of some of the prompts, in a folder that both see."""
    settings, loaded = config
    few = dataclasses.replace(settings.costs, prompts=20)
    trainer.train(dataclasses.replace(settings, costs=few))
    measured = len(join(read_folder(tmp_path / "out" / "measurements")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "measurements").symlink_to(tmp_path / "out" / "measurements")
    none = dataclasses.replace(settings.costs, prompts=-1)
    other = dataclasses.replace(settings, costs=none, seed=1, out=str(tmp_path / "other"))
    assert trainer.train(other).parent == tmp_path / "other"
    assert loaded == ["m"]
    assert len(join(read_folder(tmp_path / "other" / "measurements"))) == measured


def test_prompts_within_the_window_are_refused(config: Any) -> None:
    settings, _ = config
    wide = dataclasses.replace(settings.router, window_tokens=4096)
    with pytest.raises(ValueError, match="expected prompts of more than 4104 tokens"):
        trainer.train(dataclasses.replace(settings, router=wide))


def test_other_prompts_under_the_same_name_are_told_apart(config: Any) -> None:
    settings, _ = config
    trainer.train(settings)
    (file,) = map(Path, settings.data.files)
    file.write_text(file.read_text().replace("so it is said", "so it was said"))
    with pytest.raises(ValueError, match="measurements of the same files"):
        trainer.train(settings)


def test_costs_that_are_not_finite_are_refused(
    routed: RoutedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = routed.logits
    monkeypatch.setattr(routed, "logits", lambda hidden: logits(hidden) * float("nan"))
    with pytest.raises(ValueError, match=r"found others among the prompts \[.*--system.dtype"):
        measurer(routed).measure(make_prompts(), np.arange(5), np.zeros(5, bool))


def test_a_sharded_model_is_refused(config: Any) -> None:
    settings, _ = config
    system = dataclasses.replace(settings.system, shard_model=True)
    with pytest.raises(ValueError, match="--system.shard_model false"):
        trainer.train(dataclasses.replace(settings, system=system))
