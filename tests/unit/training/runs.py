"""Prompts of two kinds, and what a training run logged."""

import json
from typing import Any

import numpy as np
import torch

from training.data.encoding import Encoded
from training.distributed import World
from training.trainer import Trainer

CPU = World(0, 1, torch.device("cpu"))
SINK, WINDOW = 8, 32
OBJECTIVES = ["online", "paper"]
CALIBRATION_PROMPTS = 32


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


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    """Read a run's log."""
    return [json.loads(line) for line in (trainer.folder / "log.jsonl").open()]
