"""Whole runs on a tiny random model: what is learned, and what the file says of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.route import Route
from tests.unit.training.own_model import own_hidden
from tests.unit.training.runs import OBJECTIVES, SINK, WINDOW, NearAndFar, rows
from training.config import RouterSettings
from training.probe import collate_probes
from training.trainer import Trainer


def full_share(trainer: Trainer, file: Path, kind: int) -> float:
    """Return the mean P(FULL) that a router file gives new prompts of a kind."""
    router, info = read_router(file)
    prompts = [trainer.stream[1000 + 2 * at + kind] for at in range(16)]
    probes = collate_probes([p.token_ids[: p.prompt_len] for p in prompts], info.inputs)
    features = trainer.routed.probe(probes, info.inputs)
    return router.forward_all(features).softmax(dim=-1)[..., Route.FULL].mean().item()


FAST = {"batch_size": 8, "learning_rate": 5e-2}


def test_a_budget_keeps_full_layers_for_the_prompts_that_need_them(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer(
        steps=30,
        layers=3,
        stream=NearAndFar(),
        optimizer=FAST,
        budget_nats=0.05,
        multiplier_rate=0.02,
    )
    file = trainer.run()
    near, far = (full_share(trainer, file, kind) for kind in (0, 1))
    assert far > 0.85
    assert near < 0.75


def test_a_larger_budget_leaves_fewer_full_layers(make_trainer: Callable[..., Trainer]) -> None:
    shares = []
    for nats in (1e-4, 10.0):
        trainer = make_trainer(
            str(nats),
            steps=16,
            layers=3,
            stream=NearAndFar(),
            optimizer=FAST,
            budget_nats=nats,
            multiplier_rate=0.5,
        )
        trainer.run()
        shares.append(rows(trainer)[-1]["shares"]["all"])
    assert shares[0] < 0.2
    assert shares[1] > 0.6


def test_paper_objective_reaches_its_targets(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(
        steps=40,
        layers=2,
        stream=NearAndFar(),
        optimizer={"batch_size": 6, "learning_rate": 1e-2},
        objective="paper",
        targets=("near=0.5", "far=0.7"),
    )
    trainer.run()
    last = rows(trainer)[-8:]
    for task, target in (("near", 0.5), ("far", 0.7)):
        share = sum(row["shares"][task] for row in last) / len(last)
        assert share == pytest.approx(target, abs=0.1), task


def test_the_file_says_what_its_routers_look_at(make_trainer: Callable[..., Trainer]) -> None:
    chosen: dict[str, Any] = {
        "probe": (12, 40),
        "pools": ("tail:1", "ends:6", "head:12"),
        "context_depths": (0.0, 0.4, 1.0),
        "widths": (12, 10, 14, 6),
        "sparse_pattern": "triangle",
    }
    trainer = make_trainer(steps=1, router=chosen)
    router, info = read_router(trainer.run())
    assert (info.probe, info.pools, info.widths) == ((12, 40), chosen["pools"], chosen["widths"])
    assert info.context_layers == (0, 1, 3)
    assert info.inputs == trainer.inputs
    assert (info.num_layers, info.head_dim) == (4, 8)
    assert (info.sink_tokens, info.window_tokens, info.sparse_pattern) == (8, 32, "triangle")
    assert (router.num_inputs, router.shapes) == (3 * 4 * 8, trainer.router.router.shapes)
    assert sorted(info.freeing_order) == [0, 1, 2, 3]
    assert info.provenance["steps"] == 1
    assert info.provenance["config"]["optimizer"]["batch_size"] == 4  # type: ignore[index, call-overload]
    # The file decides as the routers in training do.
    features = 3 * torch.randn(4, 9, router.num_inputs)
    found = router.forward_all(features).softmax(dim=-1)
    expected = trainer.router(features).softmax(dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_the_papers_router_has_the_papers_sizes(make_trainer: Callable[..., Trainer]) -> None:
    sizes = {"pools": ("ends:8",), "context_depths": (), "widths": ()}
    router, info = read_router(make_trainer(steps=1, objective="paper", router=sizes).run())
    assert (info.pools, info.context_layers, info.widths) == (("ends:8",), (), ())
    assert router.shapes["features.0"] == (64, 8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_answers_are_weighed_by_the_objective(
    objective: str, make_trainer: Callable[..., Trainer]
) -> None:
    """All layers surely SPARSE, against the model's own code under a mask."""
    surely = {"full_bias": -40.0}
    trainer = make_trainer(
        stream=NearAndFar(), router=surely, objective=objective, logit_penalty=0.0
    )
    trainer._calibrate()
    prompts = [trainer.stream[at] for at in range(1, 9, 2)]
    row = trainer.train_step(prompts)
    assert set(row["shares"].values()) >= {1.0}
    trainer.routed.detach()
    ids = torch.tensor(np.stack([prompt.token_ids for prompt in prompts])).long()
    with torch.no_grad():
        full, sparse = (
            trainer.routed.logits(
                own_hidden(trainer.routed.model, ids, route, SINK, WINDOW)[:, 123:127]
            ).log_softmax(dim=-1)
            for route in (torch.ones(4, 4), torch.zeros(4, 4))
        )
    if objective == "budget":
        expected = (full.exp() * (full - sparse)).sum(dim=-1).mean().item()
    else:
        expected = -sparse.gather(2, ids[:, 124:, None]).mean().item()
    assert row["answers_loss"] == pytest.approx(expected, rel=1e-3)
    # No layer is FULL; multipliers of shares begin with nothing.
    weight = 30.0 if objective == "budget" else 1.0
    assert row["loss"] == pytest.approx(weight * expected, rel=1e-3)


@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
def test_the_pattern_is_trained_under_and_written(
    pattern: str, make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(steps=2, router={"sparse_pattern": pattern})
    marked: list[int] = []
    forward = trainer.routed.forward

    def watch(token_ids: Any, routes: torch.Tensor, is_tail: Any = None) -> Any:
        if routes.requires_grad:
            marked.extend(is_tail.sum(dim=1).tolist())
        return forward(token_ids, routes, is_tail)

    monkeypatch.setattr(trainer.routed, "forward", watch)
    _, info = read_router(trainer.run())
    assert info.sparse_pattern == pattern
    lens = sorted(trainer.stream[at].prompt_len for at in range(8))
    assert lens[-1] > 128 > lens[0]
    tail = 128 if pattern == "triangle" else 0
    assert sorted(marked) == [min(length, tail) for length in lens]


def test_a_pattern_that_cannot_be_trained_under_is_refused() -> None:
    with pytest.raises(ValueError, match="router.sparse_pattern.*'xattention'"):
        RouterSettings(sparse_pattern="xattention")  # type: ignore[arg-type]
