"""A tiny model, its router and its reference, shared by the end-to-end tests."""

from pathlib import Path

import pytest

from flux_vllm.router.place import beside_weights
from tests.helpers.models import write_random_router, write_tiny_llama
from tests.helpers.reference import ReferenceModel, ReferenceRouter

SINK_TOKENS, WINDOW_TOKENS = 32, 128


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 Llama of 4 layers, 8 query and 2 KV heads, with a router beside it."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
    write_random_router(
        beside_weights(folder).parent,
        num_layers=4,
        head_dim=32,
        pool_tokens=48,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=folder,
    )
    return folder


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> ReferenceModel:
    """The tiny model in transformers, float32."""
    return ReferenceModel(tiny_model)


@pytest.fixture(scope="session")
def reference_router(tiny_model: Path) -> ReferenceRouter:
    """The tiny model's router, implemented anew."""
    return ReferenceRouter.load(beside_weights(tiny_model))
