"""Mistakes reach the caller of `vllm.LLM(...)` as their own exceptions, whole and at once.

Oracle: the exception that leaves a real LLM(...) in this process, before any engine or worker has
started: nothing else is patched or faked. The models are tiny random ones.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from flux_vllm.errors import FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError
from tests.helpers.models import write_random_router, write_tiny_llama

pytestmark = pytest.mark.vllm

REFUSED = (
    "--attention-backend flux: expected none of the features that layer routes cannot be combined "
    "with, found {}; switch it off, or serve without --attention-backend flux"
)
SECONDS = 15  # of processor time, imports included


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=2)


def fails(model: Path, error: type[Exception], flux: dict | None, **arguments: Any) -> str:
    from vllm import LLM

    start = time.process_time()
    with pytest.raises(error) as raised:
        LLM(
            model=str(model),
            attention_backend="flux",
            additional_config={"flux": flux or {}},
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=256,
            **arguments,
        )
    assert type(raised.value) is error
    assert time.process_time() - start < SECONDS
    return str(raised.value)


def test_router_missing(model: Path) -> None:
    assert fails(model, RouterCheckpointError, None) == (
        f"expected a router at {model / 'flux/flux_router.safetensors'}, found nothing there; "
        "train one with `python -m training train`, or give its place as --additional-config "
        """'{"flux": {"router": "PATH"}}', or choose a policy that needs none """
        '("full", "sparse", "static")'
    )


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"num_layers": 3, "head_dim": 32}, "layers 2 as in the model, found 3"),
        ({"num_layers": 2, "head_dim": 64}, "head_dim 32 as in the model, found 64"),
    ],
    ids=["layers", "head_dim"],
)
def test_router_of_another_model(model: Path, tmp_path: Path, sizes: dict, what: str) -> None:
    router = write_random_router(tmp_path, **sizes)
    message = fails(model, RouterCheckpointError, {"router": str(router)})
    assert message == (
        f"router: expected {what} (trained for 'tiny-random'); give this model's own router with "
        """--additional-config '{"flux": {"router": "PATH"}}'"""
    )


def test_router_truncated(model: Path, tmp_path: Path) -> None:
    router = write_random_router(tmp_path, num_layers=2, head_dim=32)
    router.write_bytes(router.read_bytes()[:5000])
    message = fails(model, RouterCheckpointError, {"router": str(router)})
    assert message.startswith(f"{router}: expected a safetensors file, found one that cannot be")


def test_unknown_key(model: Path) -> None:
    message = fails(model, FluxConfigError, {"polcy": "full"})
    assert message.startswith("flux config: expected keys among ['router', 'policy', ")
    assert message.endswith(" found ['polcy']; remove or correct them")


def test_layer_out_of_range(model: Path) -> None:
    flux = {"policy": "static", "sparse_layers": [2], "sink_tokens": 16, "window_tokens": 32}
    message = fails(model, FluxConfigError, flux)
    assert "expected sparse_layers from 0 to 1 (the model has 2 layers), found [2]" in message


def test_pooling_model(model: Path) -> None:
    message = fails(model, UnsupportedConfigurationError, {"policy": "full"}, runner="pooling")
    assert message == REFUSED.format("a pooling or encoder model")


def test_kv_connector_beside_freed_blocks(model: Path) -> None:
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": "local_storage"},
    )
    message = fails(
        model,
        UnsupportedConfigurationError,
        {"policy": "sparse", "sink_tokens": 16, "window_tokens": 64, "free_kv": True},
        kv_transfer_config=connector,
    )
    assert message == (
        'flux config: expected KV blocks that stay on their device with "free_kv", found a KV '
        "connector or offloading, which moves blocks that were given back; switch it off, or drop "
        '"free_kv"'
    )


def test_float8_kv_cache_by_token_and_head(model: Path) -> None:
    message = fails(
        model,
        UnsupportedConfigurationError,
        {"policy": "full"},
        kv_cache_dtype="fp8_per_token_head",
    )
    assert message == REFUSED.format("a KV cache of dtype fp8_per_token_head")
