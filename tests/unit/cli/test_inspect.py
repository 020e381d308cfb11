"""`flux-vllm inspect`, on router files written here with the project's own writer."""

import dataclasses
import json
from pathlib import Path

import pytest

from flux_vllm.cli import main
from flux_vllm.router.checkpoint import RouterInfo, read_router, write_router
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.place import ROUTER_FILE_NAME

LAYERS, HEAD_DIM = 5, 8


@pytest.fixture
def router(tmp_path: Path) -> Path:
    """A router of 5 layers whose layer 2 leans to FULL and whose others lean to SPARSE."""
    layers = LayerRouter(LAYERS, HEAD_DIM).requires_grad_(False)
    _, bias = layers.linear("head.4")
    bias[:, 0], bias[:, 1] = 3.0, 0.0
    bias[2, 1] = 9.0
    info = RouterInfo(
        base_model="tiny",
        num_layers=LAYERS,
        head_dim=HEAD_DIM,
        pool_tokens=96,
        sink_tokens=64,
        window_tokens=512,
        provenance={"steps": 300, "trained": "2026-11-22"},
    )
    return write_router(tmp_path / ROUTER_FILE_NAME, layers, info)


def _model(folder: Path, **config: object) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_hidden_layers": LAYERS,
            }
            | config
        )
    )
    return str(folder)


@pytest.mark.parametrize("of", ["file", "folder"])
def test_inspect_describes(of: str, router: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(router if of == "file" else router.parent)]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "tiny",
        "5, head_dim 8",
        "ends:96 of the prompt's first 128 and last 128 tokens",
        "the first 64 and the latest 512 tokens",
        "steps",
        "300",
        "  0 0.05",
        "  2 1.00",
    ):
        assert expected in shown


def test_inspect_tells_a_router_of_the_latest_tokens_alone(
    router: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers, info = read_router(router)
    write_router(router, layers, dataclasses.replace(info, pool_prefix=False))
    assert main(["inspect", str(router)]) == 0
    assert "looks at      tail:96 of the prompt's first 128 and" in capsys.readouterr().out


def test_inspect_shows_widths_and_context_layers(
    router: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(router)]) == 0
    shown = capsys.readouterr().out
    assert "widths        8 inputs, then 64, 16, 32, 8\n" in shown
    assert "in layers     its own\n" in shown
    _, info = read_router(router)
    info = dataclasses.replace(
        info, pools=("tail:8", "head:16"), context_layers=(1, 4), widths=(12, 10, 14, 6)
    )
    layers = LayerRouter(LAYERS, HEAD_DIM, info.inputs.vectors, info.widths)
    write_router(router, layers, info)
    assert main(["inspect", str(router)]) == 0
    shown = capsys.readouterr().out
    assert "widths        48 inputs, then 12, 10, 14, 6\n" in shown
    assert "in layers     its own, 1, 4\n" in shown


def test_inspect_fits(router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(router), "--model", _model(tmp_path / "model")]) == 0
    assert "5 layers, head_dim 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 6}, "expected layers 6 as the model has, found 5"),
        ({"head_dim": 16}, "expected head_dim 16 as the model has, found 8"),
    ],
    ids=["layers", "head_dim"],
)
def test_inspect_does_not_fit(
    config: dict[str, object],
    expected: str,
    router: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", str(router), "--model", _model(tmp_path / "model", **config)]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert "made for tiny" in error


def test_inspect_model_whose_head_dims_differ(router: Path, tmp_path: Path) -> None:
    """Gemma 4: a router fits by either, and not by a third."""
    sizes = {"head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    config = sizes | {"model_type": "gemma4_text", "layer_types": kinds}
    model = _model(tmp_path / "model", **config)
    assert main(["inspect", str(router), "--model", model]) == 0
    other = _model(tmp_path / "other", **config | {"head_dim": 32})
    assert main(["inspect", str(router), "--model", other]) == 1


def test_inspect_multimodal_model(router: Path, tmp_path: Path) -> None:
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
    }
    model = _model(tmp_path / "model", model_type="llava", text_config=text, num_hidden_layers=99)
    assert main(["inspect", str(router), "--model", model]) == 0


def test_inspect_without_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "found nothing there" in capsys.readouterr().err


def test_inspect_broken_router(router: Path, capsys: pytest.CaptureFixture[str]) -> None:
    router.write_bytes(router.read_bytes()[:-100])
    assert main(["inspect", str(router)]) == 1
    assert "truncated" in capsys.readouterr().err


def test_inspect_model_without_config(
    router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(router), "--model", str(tmp_path / "empty")]) == 1
    assert "config.json" in capsys.readouterr().err
    broken = _model(tmp_path / "broken", model_type="no such model")
    assert main(["inspect", str(router), "--model", broken]) == 1
    assert "readable config.json" in capsys.readouterr().err
