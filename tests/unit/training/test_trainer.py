"""Whole runs on a tiny random model: what is learned, resumed exactly, stopped when diverged."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.route import Route
from tests.unit.training.own_model import own_hidden
from training import trainer as module
from training.attach import RoutedModel
from training.config import (
    DataSettings,
    LossSettings,
    OptimizerSettings,
    RouterSettings,
    SystemSettings,
    TrainConfig,
)
from training.data.encoding import Encoded
from training.data.prompt_files import FilePrompts
from training.data.stream import PromptStream
from training.distributed import World, shard_model
from training.probe import collate_probes
from training.recipes import tiny
from training.trainer import NonFiniteLossError, Trainer, train

CPU = World(0, 1, torch.device("cpu"))
SINK, WINDOW = 8, 32
OBJECTIVES = ["budget", "paper"]


class NearAndFar:
    """Prompts that FULL attention changes nothing for, and others in turn; their ends tell.

    The near ones lie within sinks and window; of the far ones, most keys lie beyond.
    """

    task_names = ("near", "far")

    def __getitem__(self, index: int) -> Encoded:
        kind = self.task_names[index % 2]
        length, mark = {"near": (SINK + WINDOW, 7), "far": (128, 9)}[kind]
        ids = np.random.default_rng(index).integers(20, 256, length).astype(np.int32)
        ids[length - 8 : length - 4] = mark
        return Encoded(kind, ids, length - 4, 0)


@pytest.fixture
def make_trainer(
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Trainer]:
    monkeypatch.setattr(module, "_CALIBRATION_PROMPTS", 32)

    def make(
        name: str = "run",
        steps: int = 60,
        world: World = CPU,
        stream: Any = None,
        router: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        layers: int = 4,
        **loss: Any,
    ) -> Trainer:
        sizes: dict[str, Any] = {
            "probe": (8, 16),
            "pools": ("tail:4", "head:8"),
            "context_depths": (1.0,),
            "widths": (16, 16, 16, 16),
            "sink_tokens": SINK,
            "window_tokens": WINDOW,
            "sparse_pattern": "streaming",
            "full_bias": 1.0,
        }
        config = TrainConfig(
            model="tiny",
            out=str(tmp_path / name),
            router=RouterSettings(**sizes | (router or {})),
            data=DataSettings(
                tasks=("needle", "repeat_end"),
                corpus=str(corpus),
                min_tokens=256,
                max_tokens=300,
                max_answer_tokens=8,
                workers=0,
            ),
            loss=LossSettings(**{"multiplier_rate": 0.3} | loss),
            optimizer=OptimizerSettings(
                **{"steps": steps, "batch_size": 4, "learning_rate": 5e-3} | (optimizer or {})
            ),
            system=SystemSettings(device="cpu", dtype="float32", save_every=10),
        )
        stream = stream or PromptStream(config.data, tokenizer, "train", config.seed)
        model = tiny_model(layers=layers).requires_grad_(False)
        shard_model(model, world)
        return Trainer(config, RoutedModel(model, SINK, WINDOW), stream, world)

    return make


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.folder / "log.jsonl").open()]


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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_resumes_exactly(objective: str, make_trainer: Callable[..., Trainer]) -> None:
    whole = make_trainer("whole", steps=13, objective=objective)
    whole.run()
    killed = make_trainer("killed", steps=13, objective=objective)
    step = killed.train_step

    def die(prompts: Any) -> Any:
        if killed.step == 12:
            raise KeyboardInterrupt
        return step(prompts)

    killed.train_step = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make_trainer("killed", steps=13, objective=objective)
    resumed.run()
    for one, other in zip(whole.router.parameters(), resumed.router.parameters(), strict=True):
        assert torch.equal(one, other)
    for buffer, other in zip(whole.router.buffers(), resumed.router.buffers(), strict=True):
        assert torch.equal(buffer, other)
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(
            torch.as_tensor(value), torch.as_tensor(resumed.objective.state_dict()[name])
        )
    expected, found = rows(whole), rows(resumed)
    assert [row["step"] for row in found] == list(range(1, 14))
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]


def test_a_diverged_run_stops_and_keeps_its_checkpoint(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(steps=14, stream=NearAndFar())
    good = trainer._answer

    def diverge(*args: Any) -> Any:
        return good(*args) * (float("nan") if trainer.step == 11 else 1.0)

    monkeypatch.setattr(trainer, "_answer", diverge)
    with pytest.raises(NonFiniteLossError, match="step 12.*last good checkpoint"):
        trainer.run()
    assert [path.name for path in (trainer.folder / "checkpoints").iterdir()] == ["step_0000010.pt"]
    assert all(torch.isfinite(p).all() for p in trainer.router.parameters())


def test_a_time_limit_ends_the_schedule(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(stream=NearAndFar(), optimizer={"time_limit_s": 1e-3})
    _, info = read_router(trainer.run())
    assert len(rows(trainer)) == info.provenance["steps"] == 1


def _run_rank(rank: int, folder: Path, make: Callable[..., Any]) -> None:
    """Do a few steps as one of two processes, the model sharded between them."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    trainer = make(World(rank, 2, torch.device("cpu")))
    trainer.run()
    torch.save(trainer.router.state_dict(), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_train_as_one(
    objective: str, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def make(name: str, world: World = CPU) -> Trainer:
        # Five prompts a step: three and two.
        sizes = {"batch_size": 5}
        return make_trainer(name, 3, world, optimizer=sizes, objective=objective)

    alone = make("alone")
    alone.run()
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined]
        _run_rank,
        args=(tmp_path, lambda world: make("both", world)),
        nprocs=2,
        start_method="fork",
    )
    for name, expected in alone.router.state_dict().items():
        ranks = [torch.load(tmp_path / f"rank{rank}.pt")[name] for rank in range(2)]
        assert torch.equal(ranks[0], ranks[1])
        torch.testing.assert_close(ranks[0], expected, rtol=1e-3, atol=1e-5)
    both = [json.loads(line) for line in (tmp_path / "both" / "log.jsonl").open()]
    assert len(both) == len(rows(alone)) == 3
    for one, other in zip(both, rows(alone), strict=True):
        for name in ("loss", "answers_loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
        assert one["shares"] == pytest.approx(other["shares"], abs=2e-4)


def prompt_file(folder: Path, count: int = 30) -> str:
    path = folder / "prompts.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"word{at} " * 90}], "answer": f"one {at} two"}
        for at in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_prompts_from_files_are_trained_on(
    objective: str, make_trainer: Callable[..., Trainer], tokenizer: Any, tmp_path: Path
) -> None:
    data = DataSettings(files=(prompt_file(tmp_path),), min_tokens=256, max_tokens=256)
    stream = FilePrompts(data, tokenizer, "train", 0, 2048)
    trainer = make_trainer(steps=8, stream=stream, objective=objective)
    before = [parameter.clone() for parameter in trainer.router.parameters()]
    trainer.run()
    assert len(rows(trainer)) * 4 > len(stream)  # into a second pass
    name = {"budget": "all", "paper": "prompt"}[objective]
    assert all(row["shares"].keys() == {name} for row in rows(trainer))
    after = trainer.router.parameters()
    assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.fixture
def tiny_config(
    tiny_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TrainConfig]:
    monkeypatch.setattr(module, "_CALIBRATION_PROMPTS", 8)
    monkeypatch.setattr(module, "load_tokenizer", lambda model: tokenizer)
    routed = RoutedModel(tiny_model(), 16, 64)
    monkeypatch.setattr(module, "load_routed", lambda *given: routed)

    def make(**data: Any) -> TrainConfig:
        config = tiny("tiny", str(tmp_path / "out"))
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, **data),
            optimizer=dataclasses.replace(config.optimizer, steps=2),
        )

    return make


def test_train_takes_prompts_from_files_or_makes_them(
    tiny_config: Callable[..., TrainConfig], corpus: Path, tmp_path: Path
) -> None:
    for number, data in enumerate(
        ({"files": (prompt_file(tmp_path),)}, {"tasks": ("needle",), "corpus": str(corpus)})
    ):
        out = str(tmp_path / f"out{number}")
        _, info = read_router(train(dataclasses.replace(tiny_config(**data), out=out)))
        assert info.provenance["steps"] == 2


@pytest.mark.parametrize("given", ["both", "neither"])
def test_train_refuses_two_sources_or_none(
    given: str, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    both = {"files": (prompt_file(tmp_path),), "tasks": ("needle",)}
    with pytest.raises(ValueError, match=rf"--data.files or made by --data.tasks, found {given}"):
        train(tiny_config(**both if given == "both" else {}))
