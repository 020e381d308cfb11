"""What the hooks read of a new request's prompt, from vLLM's own NewRequestData."""

from types import SimpleNamespace

import numpy as np
import pytest

from flux_vllm.hooks import rows
from flux_vllm.routing.prompts import Prompt
from tests.unit.hooks.step_batches import new_request

pytestmark = pytest.mark.vllm


class TestPrompts:
    def test_token_ids(self) -> None:
        found = rows.prompt_of(new_request("a", [4, 5, 6], lora_request="adapter"))
        assert found == Prompt("a", 3, [4, 5, 6], "adapter")

    def test_prompt_of_a_resumed_request_leaves_its_outputs_out(self) -> None:
        found = rows.prompt_of(new_request("a", [4, 5, 6], prefill_token_ids=[4, 5, 6, 7, 8]))
        assert (found.length, found.tokens) == (3, [4, 5, 6])

    @pytest.mark.parametrize(
        "changes",
        [
            {"prompt_embeds": np.zeros((3, 8))},
            {"prompt_token_ids": None, "prompt_embeds": np.zeros((3, 8))},
            {"mm_features": ["an image"]},
        ],
        ids=["mixed", "embeddings", "image"],
    )
    def test_what_is_no_token_ids(self, changes: dict) -> None:
        found = rows.prompt_of(new_request("a", [4, 5, 6], **changes))
        assert (found.length, found.tokens) == (3, None)

    def test_context_ends(self) -> None:
        cached = SimpleNamespace(req_ids=["b", "c"], num_computed_tokens=[40, 7])
        output = SimpleNamespace(
            scheduled_new_reqs=[new_request("a", [1] * 50, computed=32)],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={"c": 4, "a": 18, "b": 1},
        )
        assert rows.context_ends(output) == {"a": 50, "b": 41, "c": 11}
