"""Divergence from full attention, the search for static patterns, and the whole comparison.

Oracle: transformers' own code with masks of its own, a prompt at a time, and the divergence written
out in float64; made-up costs of patterns whose best is known.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.patterns import make_pattern
from flux_vllm.patterns.base import SparsePattern
from flux_vllm.router.checkpoint import RouterInfo, read_router, write_router
from flux_vllm.router.inputs import RouterInputs, parse_inputs
from flux_vllm.router.route import Route
from tests.unit.training.conftest import VOCABULARY, make_model
from tests.unit.training.own_model import own_hidden
from training.attach import RoutedModel
from training.config import DataSettings, DivergenceConfig, SystemSettings
from training.data.encoding import Encoded
from training.data.prompt_files import FilePrompts
from training.evaluation import divergence as module
from training.evaluation.divergence import (
    Divergence,
    DivergenceMeter,
    compare,
    search_static,
)
from training.policies import Policy, StaticPolicy

LAYERS, SINK, WINDOW = 4, 8, 32
ANSWER_TOKENS = 6
TRIANGLE = make_pattern("triangle", SINK, WINDOW, {"tail_tokens": 10})
STREAMING = make_pattern("streaming", SINK, WINDOW)
INPUTS: RouterInputs = parse_inputs(("tail:16",), (16, 32), ())


class ByPrompt:
    """Routes [L, B] as given, whatever is asked."""

    def __init__(self, routes: torch.Tensor) -> None:
        self.routes = routes

    def decide(self, features: torch.Tensor) -> torch.Tensor:
        assert features.shape[:2] == self.routes.shape
        return self.routes


def make_prompts() -> list[Encoded]:
    """Make prompts of several lengths; one has fewer answer tokens than are looked at."""
    generator = np.random.default_rng(3)
    return [
        Encoded("t", generator.integers(1, VOCABULARY, prompt + answer).astype(np.int32), prompt, 0)
        for prompt, answer in ((60, 4), (150, 20), (100, 6), (190, 13))
    ]


def make_meter(
    pattern: SparsePattern, token_budget: int = 512, full_decode_tokens: int = 0
) -> DivergenceMeter:
    routed = RoutedModel(make_model(layers=LAYERS), SINK, WINDOW)
    return DivergenceMeter(routed, INPUTS, pattern, ANSWER_TOKENS, token_budget, full_decode_tokens)


@torch.no_grad()
def own_divergence(
    prompt: Encoded, routes: torch.Tensor, tail_tokens: int, answer_tokens: int
) -> tuple[float, float]:
    """Give nats and agreement of one prompt [tokens] under routes [L]."""
    model = make_model(layers=LAYERS)
    ids = torch.tensor(prompt.token_ids).long()[None]
    tail = range(max(0, prompt.prompt_len - tail_tokens), prompt.prompt_len + answer_tokens)
    log_p, log_q = (
        model.lm_head(own_hidden(model, ids, of_layers[:, None], SINK, WINDOW, [tail])[0])
        .double()
        .log_softmax(dim=-1)
        for of_layers in (torch.ones(LAYERS), routes)
    )
    # An answer's token is predicted one position before its own.
    places = list(range(prompt.prompt_len - 1, len(prompt) - 1))
    count = min(len(places), ANSWER_TOKENS)
    chosen = [places[number * len(places) // count] for number in range(count)]
    nats, alike = 0.0, 0
    for at in chosen:
        nats += float((log_p[at].exp() * (log_p[at] - log_q[at])).sum())
        alike += int(log_p[at].argmax() == log_q[at].argmax())
    return nats / count, alike / count


@pytest.mark.parametrize(
    ("pattern", "answer_tokens"), [(STREAMING, 0), (TRIANGLE, 0), (TRIANGLE, 2)]
)
def test_measure_equals_log_softmax_by_hand(pattern: SparsePattern, answer_tokens: int) -> None:
    prompts = make_prompts()
    routes = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0]]).float()
    alike = torch.tensor([0.0, 1.0, 0.0, 0.0])
    policies = {
        # Computed at once, the longest prompt first.
        "by prompt": ByPrompt(routes[:, [3, 1, 2, 0]]),
        "static": StaticPolicy.with_sparse(LAYERS, [0, 2, 3]),
    }
    found = make_meter(pattern, 1024, answer_tokens).measure(prompts, policies)
    tail = 10 if pattern is TRIANGLE else 0
    for row, prompt in enumerate(prompts):
        for name, expected in (("by prompt", routes[:, row]), ("static", alike)):
            nats, agreement = own_divergence(prompt, expected, tail, answer_tokens)
            assert nats > 1e-3
            assert found[name].nats[row] == pytest.approx(nats, rel=1e-3)
            assert found[name].agreement[row] == pytest.approx(agreement)
            assert found[name].sparse[row].tolist() == (1 - expected).tolist()


def test_a_batch_changes_nothing() -> None:
    prompts, policies = make_prompts(), {"s": StaticPolicy.with_sparse(LAYERS, [1, 2])}
    alone, together = (make_meter(TRIANGLE, most).measure(prompts, policies) for most in (1, 4096))
    np.testing.assert_allclose(alone["s"].nats, together["s"].nats, rtol=1e-3)


def test_full_attention_does_not_diverge_from_itself() -> None:
    policies = {
        "full": StaticPolicy.all_full(LAYERS),
        "sparse": StaticPolicy.with_sparse(LAYERS, range(LAYERS)),
    }
    found = make_meter(STREAMING).measure(make_prompts(), policies)
    np.testing.assert_allclose(found["full"].nats, 0, atol=1e-6)
    assert found["full"].agreement.tolist() == [1.0] * 4
    assert found["full"].summary() == {"sparse_share": 0.0, "nats": 0.0, "agreement": 1.0}
    assert found["sparse"].summary()["sparse_share"] == 1.0
    assert found["sparse"].agreement.mean() < 1


def test_a_pattern_that_is_not_computed_is_refused() -> None:
    with pytest.raises(UnsupportedConfigurationError, match="found one for 'xattention'"):
        make_meter(make_pattern("xattention", SINK, WINDOW))


class MadeUpMeter:
    """Measures by a function of the SPARSE layers; keeps what was asked."""

    def __init__(self, num_layers: int, cost: Callable[[frozenset[int]], float]) -> None:
        self.routed = SimpleNamespace(num_layers=num_layers)
        self.cost = cost
        self.asked: list[frozenset[int]] = []

    def measure(
        self, prompts: Sequence[Encoded], policies: Mapping[str, StaticPolicy]
    ) -> dict[str, Divergence]:
        """Give the same cost for every prompt."""
        found = {}
        for name, policy in policies.items():
            layers = [at for at, route in enumerate(policy.routes) if route == Route.SPARSE]
            self.asked.append(frozenset(layers))
            nats = np.full(len(prompts), self.cost(self.asked[-1]), np.float32)
            found[name] = Divergence(nats, np.ones_like(nats), np.zeros((len(prompts), 0)))
        return found


def search(
    meter: MadeUpMeter, counts: Sequence[int], variations: int = 0, seed: int = 0
) -> dict[int, list[int]]:
    return search_static(meter, make_prompts(), counts, variations, seed)  # type: ignore[arg-type]


def test_search_finds_the_layers_that_cost_little() -> None:
    costs = [0.5, 0.1, 0.9, 0.2, 0.7, 0.3]
    meter = MadeUpMeter(6, lambda layers: sum(costs[at] for at in layers))
    found = search(meter, [0, 1, 3, 6])
    assert found == {0: [], 1: [1], 3: [1, 3, 5], 6: [0, 1, 2, 3, 4, 5]}


def test_search_sees_layers_that_stand_in_for_each_other() -> None:
    """Either of 0 and 1 may go, not both; what each costs alone does not say so."""

    def cost(layers: frozenset[int]) -> float:
        others = sum(1 + at / 10 for at in layers - {0, 1})
        return others + 10 * ({0, 1} <= layers)

    assert search(MadeUpMeter(6, cost), [2]) == {2: [0, 2]}


def test_search_varies_the_best_at_random() -> None:
    best = frozenset({1, 4})

    def cost(layers: frozenset[int]) -> float:
        return 0.0 if layers == best else sum(1 + at / 10 for at in layers)

    assert search(MadeUpMeter(6, cost), [2]) == {2: [0, 1]}
    meter = MadeUpMeter(6, cost)
    assert search(meter, [2], variations=60) == {2: [1, 4]}
    assert {len(layers) for layers in meter.asked} == {1, 2, 5}
    again = MadeUpMeter(6, cost)
    assert search(again, [2], variations=60) == {2: [1, 4]}
    assert again.asked == meter.asked


@pytest.fixture
def config(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DivergenceConfig:
    info = RouterInfo(
        base_model="tiny",
        num_layers=LAYERS,
        head_dim=8,
        pool_tokens=16,
        probe=(16, 32),
        pools=("tail:16",),
        widths=(8, 8, 8, 8),
        sink_tokens=SINK,
        window_tokens=WINDOW,
        provenance={"config": {"seed": 7}},
    )
    torch.manual_seed(0)
    write_router(tmp_path, info.make_router(), info)
    routed = RoutedModel(make_model(layers=LAYERS), SINK, WINDOW)
    monkeypatch.setattr(module, "load_routed", lambda *arguments: routed)
    monkeypatch.setattr(module, "load_tokenizer", lambda model: tokenizer)
    rows = [
        {"prompt": " ".join(f"w{at}x{word}" for word in range(90 + at)), "answer": f"a{at} b c d"}
        for at in range(40)
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DivergenceConfig(
        model="tiny",
        router=str(tmp_path),
        out=str(tmp_path / "out"),
        data=DataSettings(files=(str(file),)),
        prompts=5,
        search_prompts=4,
        thresholds=(0.0, 0.5, 1.0),
        shares=(0.5, 0.75),
        random_patterns=2,
        answer_tokens=3,
        system=SystemSettings(device="cpu", dtype="float32"),
    )


def test_compare_writes_means_and_values_by_prompt(
    config: DivergenceConfig, tokenizer: Any
) -> None:
    report = compare(config)
    written = json.loads((Path(config.out) / "divergence.json").read_text())
    assert written["rows"] == report["rows"]
    rows = {row["policy"]: row for row in written["rows"]}
    names = ["sparse", "router@0", "router@0.5", "router@1", "static@2", "static@3"]
    assert list(rows) == names
    assert {key: len(layers) for key, layers in written["static_layers"].items()} == {
        "2": 2,
        "3": 3,
    }
    # Threshold 0 lets no layer be SPARSE, threshold 1 every layer.
    assert rows["router@0"] == {
        "policy": "router@0",
        "sparse_share": 0.0,
        "nats": 0.0,
        "agreement": 1.0,
    }
    assert rows["router@1"] == rows["sparse"] | {"policy": "router@1"}
    assert [rows[f"static@{count}"]["sparse_share"] for count in (2, 3)] == [0.5, 0.75]
    assert set(written["need_correlation"]) == {"router@0", "router@0.5", "router@1"}
    assert written["need_correlation"]["router@0"] is None
    assert written["provenance"]["router"] == {"config": {"seed": 7}}
    assert list(written["provenance"]["data_sha256"]) == ["prompts.jsonl"]

    with np.load(Path(config.out) / "divergence.npz") as stored:
        assert set(stored) == {f"{name}/{part}" for name in names for part in ("nats", "sparse")}
        for name in names:
            assert stored[f"{name}/sparse"].shape == (len(stored[f"{name}/nats"]), LAYERS)
            assert rows[name]["nats"] == pytest.approx(stored[f"{name}/nats"].mean(), abs=1e-5)
        found = stored["static@2/nats"]
    test = FilePrompts(config.data, tokenizer, "test", config.seed, 2048).sample(config.prompts)
    policy: Policy = StaticPolicy.with_sparse(LAYERS, written["static_layers"]["2"])
    _, info = read_router(Path(config.router))
    meter = DivergenceMeter(module.load_routed(), info.inputs, STREAMING, 3, 1)  # type: ignore[call-arg]
    np.testing.assert_allclose(found, meter.measure(test, {"s": policy})["s"].nats, rtol=1e-3)


def test_compare_without_a_search(config: DivergenceConfig) -> None:
    report = compare(dataclasses.replace(config, search_prompts=0))
    assert report["static_layers"] == {}
    assert [row["policy"] for row in report["rows"]] == [
        "sparse",
        "router@0",
        "router@0.5",
        "router@1",
    ]
