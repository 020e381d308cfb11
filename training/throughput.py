"""Training speed and peak memory against prompt length, on made-up tokens.

What is timed is the trainer's own step. Which tokens a prompt holds, and how far they reach beyond
the positions a model knows, changes nothing in its cost.
"""

import dataclasses
import gc
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training import recipes
from training.attach import RoutedModel
from training.config import TrainConfig
from training.data.encoding import Encoded
from training.distributed import World, start_world
from training.evaluation.report import write_json
from training.model_loading import load_routed
from training.provenance import provenance
from training.trainer import Trainer

_WARM_UP_STEPS = 2
_TASK = "needle"
_ANSWER_TOKENS = 64
_OBJECTIVES = {"lm": "paper", "kl": "online"}


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement."""

    checkpoint_layers: bool
    loss: str
    """`lm` or `kl`."""
    length: int
    """Tokens of a prompt, its answer included."""


class MadeUpPrompts:
    """Stands where the trainer looks for prompts of one task: random tokens of one length.

    Args:
        vocabulary: token ids are below it.
        length: tokens of a prompt and its answer.
    """

    task_names = (_TASK,)

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary = vocabulary
        self.length = length

    def __getitem__(self, index: int) -> Encoded:
        """Make prompt `index`."""
        ids = np.random.default_rng(index).integers(self.vocabulary, size=self.length)
        return Encoded(_TASK, ids.astype(np.int32), self.length - _ANSWER_TOKENS, 0)


def measure(
    model: str,
    out: Path,
    recipe: str,
    lengths: tuple[int, ...],
    tokens: int,
    steps: int,
    compile_layers: bool | None = None,
) -> list[dict[str, Any]]:
    """Measure every length with each loss, with and without recomputed activations.

    Args:
        model: folder or name.
        out: JSON file, written anew after each row.
        recipe: whose router sizes, dtype, kernels and compilation are measured.
        lengths: tokens of a prompt.
        tokens: computed at once and in one step: as many prompts as fit, one at least.
        steps: timed of each case.
        compile_layers: in place of the recipe's; None: as the recipe says.

    Returns: the rows.
    Raises: ValueError: a length that leaves no room for a prompt, or nothing to time.
    """
    if min(lengths, default=0) < 2 * _ANSWER_TOKENS or steps < 1:
        raise ValueError(
            f"expected lengths of at least {2 * _ANSWER_TOKENS} tokens and at least one step, "
            f"found {lengths} and {steps}; correct --lengths or --steps"
        )
    base = dataclasses.replace(recipes.RECIPES[recipe](), model=model)
    if compile_layers is not None:
        system = dataclasses.replace(base.system, compile_layers=compile_layers)
        base = dataclasses.replace(base, system=system)
    world = start_world(base.system.device)
    source = provenance(world.device)
    rows: list[dict[str, Any]] = []
    for checkpoint_layers in (False, True):
        system = dataclasses.replace(base.system, checkpoint_layers=checkpoint_layers)
        router = base.router
        routed = load_routed(model, router.sink_tokens, router.window_tokens, system, world)
        for loss, length in product(_OBJECTIVES, lengths):
            case = Case(checkpoint_layers, loss, length)
            rows.append(_measure_case(base, case, routed, world, tokens, steps))
            write_json(out, {"rows": rows, "config": base.to_dict(), "provenance": source})
            sys.stderr.write(f"{rows[-1]}\n")
        # Before the next is loaded: a large model fits once.
        del routed
    return rows


def _measure_case(
    base: TrainConfig, case: Case, routed: RoutedModel, world: World, tokens: int, steps: int
) -> dict[str, Any]:
    """Time one case; memory that does not suffice is a result too."""
    count = max(1, tokens // case.length)
    row: dict[str, Any] = dataclasses.asdict(case) | {"prompts": count}
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    try:
        seconds, computed = _time_steps(_trainer(base, case, routed, world, count), count, steps)
    except torch.OutOfMemoryError:
        return row | {"error": "out of memory"}
    middle = statistics.median(seconds)
    return row | {
        "tokens": computed,
        "seconds": round(middle, 4),
        "seconds_range": [round(min(seconds), 4), round(max(seconds), 4)],
        "tokens_per_second": round(computed / middle),
        "peak_gib": world.peak_gib(),
    }


def _trainer(
    base: TrainConfig, case: Case, routed: RoutedModel, world: World, count: int
) -> Trainer:
    config = dataclasses.replace(
        base,
        loss=dataclasses.replace(base.loss, targets=(), objective=_OBJECTIVES[case.loss]),  # type: ignore[arg-type]
        optimizer=dataclasses.replace(
            base.optimizer,
            batch_size=count,
            # Room for the padding of each prompt: all of a step's prompts are computed at once.
            micro_batch_tokens=count * (case.length + 128),
            time_limit_s=0.0,
        ),
    )
    stream = MadeUpPrompts(routed.config.vocab_size, case.length)
    return Trainer(config, routed, stream, world)  # type: ignore[arg-type]


def _time_steps(trainer: Trainer, count: int, steps: int) -> tuple[list[float], int]:
    """Give the seconds of each timed step, and the tokens of one."""
    seconds = []
    tokens = 0
    for step in range(_WARM_UP_STEPS + steps):
        prompts = [trainer.stream[step * count + at] for at in range(count)]
        began = time.perf_counter()
        tokens = trainer.train_step(prompts)["tokens"]
        if trainer.world.device.type == "cuda":
            torch.cuda.synchronize(trainer.world.device)
        seconds.append(time.perf_counter() - began)
    return seconds[_WARM_UP_STEPS:], tokens
