"""The latest steps' pooled queries, kept so that the share constraint sees many of each task.

A step has a handful of prompts of a task, too few to tell a task's share by, or how alike its
prompts are routed. Earlier prompts cost nothing to route again: their pooled queries are at hand,
of a router a few steps younger.

Dimension legend: L layers, R prompts (and early chunks) of a step, H head dim.
"""

from typing import Any

import torch

from training.distributed import World


class RecentPrompts:
    """The pooled queries of the latest steps, the same in every process.

    Args:
        steps: kept beside the running one; 0 keeps none.
        world: this process among the others.
    """

    def __init__(self, steps: int, world: World) -> None:
        self.steps = steps
        self.world = world
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def extend(
        self, features: torch.Tensor, groups: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a step's prompts and forget the oldest step.

        Args:
            features: [L, R, H] of this process's prompts, detached.
            groups: [R] int64, the constraint each counts for.

        Returns: both, of the steps kept and all processes' prompts of this one.
        """
        parts = self.world.gather((features.cpu(), groups.cpu()))
        device = self.world.device
        self._kept += [(part.to(device), group.to(device)) for part, group in parts]
        all_features = torch.cat([part for part, _ in self._kept], dim=1)
        all_groups = torch.cat([group for _, group in self._kept])
        excess = len(self._kept) - self.steps * self.world.size
        self._kept = self._kept[max(0, excess) :]
        return all_features, all_groups

    def state_dict(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what a resumed run needs."""
        return self._kept

    def load_state_dict(self, state: Any) -> None:
        """Take up where `state_dict` left off."""
        device = self.world.device
        self._kept = [(part.to(device), group.to(device)) for part, group in state]
