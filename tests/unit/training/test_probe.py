"""Probes of a batch; oracle: slices of the prompts by hand, and each prompt alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.router.inputs import parse_inputs
from training.attach import RoutedModel
from training.probe import ProbeBatch, collate_probes

INPUTS = parse_inputs(["tail:1", "head:3", "ends:2"], [3, 5], [1])
LENGTHS = [1, 2, 7, 8, 9, 40]


@pytest.fixture
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 256, length).astype(np.int32) for length in LENGTHS]


def test_collated_probes_are_the_prompts_ends(prompts: list[np.ndarray]) -> None:
    batch = collate_probes(prompts, INPUTS)
    assert batch.token_ids.shape == batch.positions.shape == (6, 8)
    assert batch.token_ids.dtype == batch.positions.dtype == torch.int64
    for row, prompt in enumerate(prompts):
        ids = [*prompt] if len(prompt) <= 8 else [*prompt[:3], *prompt[-5:]]
        padding = [0] * (8 - len(ids))
        assert batch.token_ids[row].tolist() == ids + padding
    assert batch.positions[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert batch.positions[3].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.positions[4].tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert batch.positions[5].tolist() == [0, 1, 2, 35, 36, 37, 38, 39]


def test_weights_average_the_pools_of_the_tokens_that_are_there(prompts: list[np.ndarray]) -> None:
    weights = collate_probes(prompts, INPUTS).weights
    assert weights.dtype == torch.float32
    third = 1 / 3
    expected = {
        # One token is every pool; of two, `ends:2` takes both twice.
        0: [[1], [1], [1]],
        1: [[0, 1], [0.5, 0.5], [0.5, 0.5]],
        2: [[0] * 6 + [1], [third] * 3, [0.25, 0.25, 0, 0, 0, 0.25, 0.25]],
        5: [[0] * 7 + [1], [third] * 3, [0.25, 0.25, 0, 0, 0, 0, 0.25, 0.25]],
    }
    for row, pools in expected.items():
        padded = torch.tensor([pool + [0] * (8 - len(pool)) for pool in pools])
        torch.testing.assert_close(weights[row], padded.float())


def test_split_keeps_order_and_loses_nothing(prompts: list[np.ndarray]) -> None:
    batch = collate_probes(prompts, INPUTS)
    parts = batch.split(4)
    assert [len(part.token_ids) for part in parts] == [4, 2]
    for field in dataclasses.fields(ProbeBatch):
        joined = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(joined, getattr(batch, field.name))


def test_a_prompts_features_do_not_depend_on_the_batch(
    prompts: list[np.ndarray], tiny_model: Callable[..., Any]
) -> None:
    routed = RoutedModel(tiny_model(), 4, 16)
    together = routed.probe(collate_probes(prompts, INPUTS), INPUTS)
    for row, prompt in enumerate(prompts):
        alone = routed.probe(collate_probes([prompt], INPUTS), INPUTS)
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_padding_and_the_middle_are_not_seen(
    prompts: list[np.ndarray], tiny_model: Callable[..., Any]
) -> None:
    routed = RoutedModel(tiny_model(), 4, 16)
    batch = collate_probes(prompts, INPUTS)
    features = routed.probe(batch, INPUTS)
    for row, length in enumerate(LENGTHS[:3]):
        batch.token_ids[row, length:] = 99
        batch.positions[row, length:] = 1000
    assert torch.equal(routed.probe(batch, INPUTS), features)
    prompts[5][3:35] = 99
    assert torch.equal(routed.probe(collate_probes(prompts, INPUTS), INPUTS), features)
    prompts[5][35] = 99
    other = routed.probe(collate_probes(prompts, INPUTS), INPUTS)
    assert (other - features)[:, 5].abs().max() > 0.01
    assert torch.equal(other[:, :5], features[:, :5])
