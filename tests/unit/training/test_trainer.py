"""Whole runs on a tiny random model: targets reached, resumed exactly, stopped when diverged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flux_vllm.router.checkpoint import read_router
from training.attach import RoutedModel
from training.config import (
    DataSettings,
    LossSettings,
    OptimizerSettings,
    RouterSettings,
    SystemSettings,
    TrainConfig,
)
from training.data.stream import PromptStream
from training.distributed import World, shard_model
from training.pooling import ChunkPlan
from training.trainer import NonFiniteLossError, Trainer

CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture
def make_trainer(
    tiny_model: Callable[..., Any], tokenizer: Any, corpus: Path, tmp_path: Path
) -> Callable[..., Trainer]:
    def make(
        name: str = "run",
        steps: int = 60,
        world: World = CPU,
        pattern: Any = "streaming",
        **loss: float,
    ) -> Trainer:
        config = TrainConfig(
            model="tiny",
            out=str(tmp_path / name),
            router=RouterSettings(
                pool_tokens=16,
                sink_tokens=8,
                window_tokens=32,
                full_bias=1.0,
                sparse_pattern=pattern,
            ),
            data=DataSettings(
                tasks=("needle", "repeat_end"),
                corpus=str(corpus),
                min_tokens=256,
                max_tokens=300,
                max_answer_tokens=8,
                workers=0,
            ),
            loss=LossSettings(
                targets=("retrieval=0.6", "local=0.6", "early_chunks=0.6"),
                multiplier_rate=0.3,
                penalty=10.0,
                target_ramp=0.3,
                spread_penalty=0.5,
                recent_steps=3,
                **loss,  # type: ignore[arg-type]
            ),
            optimizer=OptimizerSettings(steps=steps, batch_size=4, learning_rate=5e-3),
            system=SystemSettings(device="cpu", dtype="float32", save_every=10),
        )
        stream = PromptStream(config.data, tokenizer, "train", config.seed)
        model = tiny_model().requires_grad_(False)
        shard_model(model, world)
        return Trainer(config, RoutedModel(model, 8, 32), stream, world)

    return make


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.folder / "log.jsonl").open()]


def test_run_reaches_its_targets_and_writes_a_router(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    router, info = read_router(trainer.run())
    last = rows(trainer)[-5:]
    for task in ("needle", "repeat_end"):
        share = sum(row["shares"][task] for row in last) / len(last)
        assert share == pytest.approx(0.6, abs=0.1), task
    assert (router.num_layers, router.head_dim) == (4, 8)
    assert (info.pool_tokens, info.sink_tokens, info.window_tokens) == (16, 8, 32)
    assert info.provenance["steps"] == 60
    assert info.provenance["config"]["optimizer"]["batch_size"] == 4  # type: ignore[index, call-overload]


def test_losses_are_weighted(
    make_trainer: Callable[..., Trainer],
) -> None:
    def first_loss(name: str, **weights: float) -> float:
        trainer = make_trainer(name, steps=1, **weights)
        trainer.run()
        loss: float = rows(trainer)[0]["loss"]
        return loss

    once, twice = first_loss("once"), first_loss("twice", lm_weight=2.0)
    cross_entropy, rest = twice - once, 2 * once - twice  # the rest: constraints and logit penalty
    divergence = first_loss("distilled", lm_weight=0.0, distillation_weight=1.0) - rest
    both = first_loss("both", lm_weight=0.5, distillation_weight=2.0)
    assert cross_entropy > divergence > 0.1
    assert both == pytest.approx(0.5 * cross_entropy + 2 * divergence + rest, rel=1e-4)


@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
def test_the_pattern_is_trained_under_and_written(
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
) -> None:
    trainer = make_trainer(steps=2, pattern=pattern)
    marked: list[int] = []
    forward = trainer.routed.forward

    def watch(token_ids: torch.Tensor, plan: ChunkPlan, *more: Any) -> Any:
        marked.extend(plan.is_tail.sum(dim=1).tolist())
        return forward(token_ids, plan, *more)

    monkeypatch.setattr(trainer.routed, "forward", watch)
    _, info = read_router(trainer.run())
    assert info.sparse_pattern == pattern
    assert {count > 0 for count in marked} == {pattern == "triangle"}


def test_a_pattern_that_cannot_be_trained_under_is_refused() -> None:
    with pytest.raises(ValueError, match="router.sparse_pattern.*'xattention'"):
        RouterSettings(sparse_pattern="xattention")  # type: ignore[arg-type]


def test_a_killed_run_resumes_exactly(make_trainer: Callable[..., Trainer]) -> None:
    whole = make_trainer("whole", steps=14)
    whole.run()
    killed = make_trainer("killed", steps=14)
    step = killed.train_step

    def die(prompts: Any) -> Any:
        if killed.step == 12:
            raise KeyboardInterrupt
        return step(prompts)

    killed.train_step = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make_trainer("killed", steps=14)
    resumed.run()
    for one, other in zip(whole.router.parameters(), resumed.router.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.constraints.multipliers, resumed.constraints.multipliers)
    expected, found = rows(whole), rows(resumed)
    assert [row["step"] for row in found] == list(range(1, 15))
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]


def test_a_diverged_run_stops_and_keeps_its_checkpoint(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(steps=14)
    good = trainer._micro_step

    def diverge(*args: Any) -> Any:
        loss, features, groups = good(*args)
        return loss * (float("nan") if trainer.step == 11 else 1.0), features, groups

    monkeypatch.setattr(trainer, "_micro_step", diverge)
    with pytest.raises(NonFiniteLossError, match="step 12.*last good checkpoint"):
        trainer.run()
    assert [path.name for path in (trainer.folder / "checkpoints").iterdir()] == ["step_0000010.pt"]
    assert all(torch.isfinite(p).all() for p in trainer.router.parameters())


def _run_rank(rank: int, folder: Path, make_config: Callable[..., Any]) -> None:
    """Do two steps as one of two processes, the model sharded between them."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    trainer = make_config(World(rank, 2, torch.device("cpu")))
    trainer.run()
    torch.save(trainer.router.state_dict(), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    alone = make_trainer("alone", steps=3)
    alone.run()
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined]
        _run_rank,
        args=(tmp_path, lambda world: make_trainer("both", steps=3, world=world)),
        nprocs=2,
        start_method="fork",
    )
    for name, expected in alone.router.state_dict().items():
        ranks = [torch.load(tmp_path / f"rank{rank}.pt")[name] for rank in range(2)]
        assert torch.equal(ranks[0], ranks[1])
        torch.testing.assert_close(ranks[0], expected, rtol=1e-3, atol=1e-5)
    assert len(rows(alone)) == 3
