"""How whole runs go: resumed exactly, stopped when diverged, over two processes, from files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flux_vllm.router.checkpoint import read_router
from tests.unit.training.conftest import build_trainer
from tests.unit.training.runs import CALIBRATION_PROMPTS, OBJECTIVES, NearAndFar, rows
from training import trainer as module
from training.attach import RoutedModel
from training.config import DataSettings, LossSettings, TrainConfig
from training.data.prompt_files import FilePrompts
from training.distributed import World
from training.recipes import tiny
from training.trainer import NonFiniteLossError, Trainer, train

ONLINE = LossSettings(objective="online")


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


# Five prompts a step: three and two.
_TWO_PROCESSES = {"steps": 3, "optimizer": {"batch_size": 5}}


def _run_rank(rank: int, folder: Path, corpus: Path) -> None:
    """Do a few steps as one of two processes, the model sharded between them."""
    module._CALIBRATION_PROMPTS = CALIBRATION_PROMPTS
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    world = World(rank, 2, torch.device("cpu"))
    for objective in OBJECTIVES:
        trainer = build_trainer(
            folder, corpus, objective, world=world, objective=objective, **_TWO_PROCESSES
        )
        trainer.run()
        torch.save(trainer.router.state_dict(), folder / objective / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(
    make_trainer: Callable[..., Trainer], corpus: Path, tmp_path: Path
) -> None:
    # Not forked: threads that have computed here would be missing in a child, which waits for them.
    torch.multiprocessing.spawn(_run_rank, args=(tmp_path, corpus), nprocs=2)  # type: ignore[no-untyped-call]
    for objective in OBJECTIVES:
        alone = make_trainer(f"alone_{objective}", objective=objective, **_TWO_PROCESSES)
        alone.run()
        folder = tmp_path / objective
        for name, expected in alone.router.state_dict().items():
            ranks = [torch.load(folder / f"rank{rank}.pt")[name] for rank in range(2)]
            assert torch.equal(ranks[0], ranks[1])
            torch.testing.assert_close(ranks[0], expected, rtol=1e-3, atol=1e-5)
        both = [json.loads(line) for line in (folder / "log.jsonl").open()]
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
    name = {"online": "all", "paper": "prompt"}[objective]
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
        config = dataclasses.replace(tiny_config(**data), loss=ONLINE, out=out)
        _, info = read_router(train(config))
        assert info.provenance["steps"] == 2


@pytest.mark.parametrize("given", ["both", "neither"])
def test_train_refuses_two_sources_or_none(
    given: str, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    both = {"files": (prompt_file(tmp_path),), "tasks": ("needle",)}
    config = dataclasses.replace(tiny_config(**both if given == "both" else {}), loss=ONLINE)
    with pytest.raises(ValueError, match=rf"--data.files or made by --data.tasks, found {given}"):
        train(config)


@pytest.mark.parametrize(("given", "found"), [(True, "--data.tasks too"), (False, "none")])
def test_costs_are_measured_on_files_alone(
    given: bool, found: str, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    data = {"files": (prompt_file(tmp_path),)} if given else {}
    with pytest.raises(ValueError, match=f"--data.files alone.*found {found}"):
        train(tiny_config(tasks=("needle",), **data))
