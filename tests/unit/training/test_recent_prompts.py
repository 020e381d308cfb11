"""The queue of earlier steps' prompts."""

import torch

from training.distributed import World
from training.recent_prompts import RecentPrompts

ALONE = World(0, 1, torch.device("cpu"))


def step(value: float, prompts: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((2, prompts, 3), value), torch.full((prompts,), int(value))


def test_the_latest_steps_are_kept_whole() -> None:
    recent = RecentPrompts(2, ALONE)
    sizes = []
    for value, prompts in enumerate([4, 1, 3, 2]):
        features, groups = recent.extend(*step(float(value), prompts))
        assert features.shape == (2, len(groups), 3)
        assert torch.equal(features[0, :, 0].long(), groups)
        sizes.append(groups.tolist())
    assert sizes == [[0] * 4, [0] * 4 + [1], [0] * 4 + [1] + [2] * 3, [1] + [2] * 3 + [3] * 2]


def test_none_are_kept_where_none_are_asked_for() -> None:
    recent = RecentPrompts(0, ALONE)
    for value in (0.0, 1.0):
        assert recent.extend(*step(value, 2))[1].tolist() == [int(value)] * 2


def test_state_is_taken_up() -> None:
    one, other = RecentPrompts(1, ALONE), RecentPrompts(1, ALONE)
    one.extend(*step(1.0, 2))
    other.load_state_dict(one.state_dict())
    for a, b in zip(one.extend(*step(2.0, 1)), other.extend(*step(2.0, 1)), strict=True):
        assert torch.equal(a, b)
