"""Compiled norms and MLPs against the model's own code."""

from collections.abc import Callable
from typing import Any

import torch

from training.model_loading import compile_layers


def test_compiled_layers_give_the_same_hidden_states(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model().requires_grad_(False)
    token_ids = torch.arange(2 * 37).view(2, 37) % model.config.vocab_size
    before = model.model(token_ids).last_hidden_state
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_layers(model)
    after = model.model(token_ids).last_hidden_state
    torch.testing.assert_close(after, before)
    # One norm and one MLP, however many layers share them.
    assert counters["stats"]["unique_graphs"] == 2
    assert len(model.model.layers) > 1
