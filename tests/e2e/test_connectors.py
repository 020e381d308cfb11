"""KV connectors: keys that another engine computed, loaded in the place of a prompt's prefill.

Oracle: tests/helpers/reference.py, whose history is what the engine that stored the keys computed:
loaded keys are those of a prefix-cache hit. The connector is vLLM's example, which keeps each
layer's keys in a file. Pinned: a connector never sees a probe's forward.
"""

from pathlib import Path

import pytest

from flux_vllm.routing.probe import ProbeMetadata
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Answer, Engine
from tests.helpers.models import random_prompt
from tests.helpers.reference import FULL, SPARSE, SparsePattern
from tests.helpers.replay import assert_routed, assert_same, replay

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK_SIZE = 32
PATTERN = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
PROMPTS = [random_prompt(length, seed=length) for length in (100, 421, 700)]
STORED = {100: 96, 421: 416, 700: 672}
"""Tokens of a prompt in whole blocks, but for the last one."""
SIZES = {"sink_tokens": SINK_TOKENS, "window_tokens": WINDOW_TOKENS}


def _answer(model: Path, flux: dict, store: Path) -> list[Answer]:
    """Answer all prompts in one engine, whose connector stores keys and loads those it finds."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
    }
    with Engine(model, flux, block_size=BLOCK_SIZE, kv_transfer_config=connector) as engine:
        return engine.generate(PROMPTS, 24)


def _assert_loaded(answers: list[Answer]) -> None:
    for answer in answers:
        assert answer.steps[0][0] == STORED[len(answer.prompt)]


def test_keys_stored_under_other_routes(tiny_model, reference, tmp_path) -> None:
    writer, reader = [SPARSE, FULL, SPARSE, FULL], [FULL, SPARSE, SPARSE, FULL]
    stored, loaded = (
        _answer(
            tiny_model,
            {"policy": "static", "sparse_layers": [i for i in range(4) if routes[i] == SPARSE]}
            | SIZES,
            tmp_path,
        )
        for routes in (writer, reader)
    )
    _assert_loaded(loaded)
    for first, second in zip(stored, loaded, strict=True):
        source = replay(reference, first, PATTERN, writer)
        assert first.steps[0][0] == 0
        assert_same(first, source)
        request = replay(reference, second, PATTERN, reader, history=source.history)
        assert_same(second, request)


def test_router(tiny_model, reference, reference_router, tmp_path, monkeypatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

    saved = []
    save = ExampleConnector.save_kv_layer

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        saved.append(type(attn_metadata))
        return save(self, layer_name, kv_layer, attn_metadata, **kwargs)

    monkeypatch.setattr(ExampleConnector, "save_kv_layer", save_kv_layer)
    stored, loaded = (_answer(tiny_model, {}, tmp_path) for _ in range(2))
    assert saved
    assert ProbeMetadata not in saved
    _assert_loaded(loaded)
    for first, second in zip(stored, loaded, strict=True):
        source = assert_routed(first, reference, reference_router, PATTERN)
        assert_routed(second, reference, reference_router, PATTERN, source.history)
        assert first.routes == second.routes
