"""Router files: what is written comes back bit for bit, and every way to be broken has its message.

Oracle: safetensors' own reader and writer, with tensor names and shapes spelled out from
DESIGN.md, section 2. Pinned: a failed write leaves the old file and no temporary one.
"""

import json
import math
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router import checkpoint
from flux_vllm.router.checkpoint import (
    RouterInfo,
    locate_router,
    read_info,
    read_router,
    write_router,
)
from flux_vllm.router.model import LayerRouter

LAYERS, HEAD_DIM = 3, 4
INFO = RouterInfo(
    base_model="org/Model-1B",
    num_layers=LAYERS,
    head_dim=HEAD_DIM,
    pool_tokens=48,
    sink_tokens=0,
    window_tokens=256,
    provenance={"steps": 300, "when": "2026-04-04", "data": ["a", {"b": 1.5}]},
)
METADATA = {
    "format_version": "1",
    "base_model": "org/Model-1B",
    "num_layers": "3",
    "head_dim": "4",
    "pool_tokens": "48",
    "sink_tokens": "0",
    "window_tokens": "256",
    "sparse_pattern": "streaming",
}
SHAPES = {
    "features.0": (32, 4),
    "features.2": (8, 32),
    "head.0": (16, 8),
    "head.2": (4, 16),
    "head.4": (2, 4),
}


def tensors_by_name() -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in SHAPES.items():
            tensors[f"layers.{layer}.{name}.weight"] = torch.randn(outputs, inputs)
            tensors[f"layers.{layer}.{name}.bias"] = torch.randn(outputs)
    return tensors


def write_raw(
    path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str | None
) -> Path:
    """Write a file through safetensors alone; a metadata field given as None is left out."""
    merged = {k: v for k, v in (METADATA | metadata).items() if v is not None}
    save_file(tensors_by_name() if tensors is None else tensors, str(path), merged)
    return path


def refused(path: Path, message: str, read: Callable = read_router) -> None:
    with pytest.raises(RouterCheckpointError) as error:
        read(path)
    assert re.fullmatch(message, str(error.value), flags=re.DOTALL), str(error.value)
    assert str(path) in str(error.value)


class TestRoundTrip:
    def test_bits_and_metadata(self, tmp_path: Path) -> None:
        router = LayerRouter(LAYERS, HEAD_DIM)
        path = write_router(tmp_path / "r.safetensors", router, INFO)
        found, info = read_router(path)
        assert info == INFO
        assert (found.num_layers, found.head_dim) == (LAYERS, HEAD_DIM)
        expected = dict(router.named_parameters())
        assert len(expected) == 10
        for name, tensor in found.named_parameters():
            assert tensor.dtype == torch.float32
            assert not tensor.requires_grad
            assert torch.equal(tensor.view(torch.int32), expected[name].view(torch.int32)), name

    def test_names_shapes_and_strings_in_the_file(self, tmp_path: Path) -> None:
        router = LayerRouter(LAYERS, HEAD_DIM)
        path = write_router(tmp_path / "r.safetensors", router, INFO)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(metadata.pop("provenance")) == INFO.provenance
        assert metadata == METADATA
        assert {n: tuple(t.shape) for n, t in found.items()} == {
            n: tuple(t.shape) for n, t in tensors_by_name().items()
        }
        # Layer 1's third linear layer is slice 1 of the stacked one, in the same orientation.
        weight, bias = router.linear("head.0")
        assert torch.equal(found["layers.1.head.0.weight"], weight[1])
        assert torch.equal(found["layers.1.head.0.bias"], bias[1])

    def test_file_of_another_writer(self, tmp_path: Path) -> None:
        tensors = tensors_by_name()
        router, info = read_router(write_raw(tmp_path / "r.safetensors", tensors))
        assert info.provenance == {}
        for name, tensor in tensors.items():
            _, layer, part, index, kind = name.split(".")
            stacked = router.linear(f"{part}.{index}")[kind == "bias"]
            assert torch.equal(stacked[int(layer)], tensor), name

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_weights_become_float32(self, tmp_path: Path, dtype) -> None:
        tensors = {n: t.to(dtype) for n, t in tensors_by_name().items()}
        router, _ = read_router(write_raw(tmp_path / "r.safetensors", tensors))
        weight, bias = router.linear("features.2")
        assert weight.dtype == bias.dtype == torch.float32
        assert torch.equal(weight[2], tensors["layers.2.features.2.weight"].float())
        assert torch.equal(bias[2], tensors["layers.2.features.2.bias"].float())

    def test_written_float16_halves_the_weights_alone(self, tmp_path: Path) -> None:
        router = LayerRouter(LAYERS, HEAD_DIM)
        path = write_router(tmp_path / "r.safetensors", router, INFO, torch.float16)
        found, info = read_router(path)
        assert info == INFO
        for name in SHAPES:
            (weight, bias), (own_weight, own_bias) = found.linear(name), router.linear(name)
            assert torch.equal(weight, own_weight.half().float())
            assert torch.equal(bias, own_bias)

    def test_dtypes_by_linear_layer(self, tmp_path: Path) -> None:
        router = LayerRouter(LAYERS, HEAD_DIM)
        dtypes = dict.fromkeys(SHAPES, torch.float16)
        dtypes |= {"head.4": torch.float32, "features.0": torch.float8_e4m3fn}
        path = write_router(tmp_path / "r.safetensors", router, INFO, dtypes)
        with safe_open(path, framework="pt") as file:
            for name, dtype in dtypes.items():
                assert file.get_tensor(f"layers.2.{name}.weight").dtype == dtype
                assert file.get_tensor(f"layers.2.{name}.bias").dtype == torch.float32
        found, _ = read_router(path)
        for name, dtype in dtypes.items():
            weight = router.linear(name)[0]
            assert torch.equal(found.linear(name)[0], weight.to(dtype).float())

    def test_read_info_alone(self, tmp_path: Path) -> None:
        path = write_router(tmp_path / "r.safetensors", LayerRouter(LAYERS, HEAD_DIM), INFO)
        assert read_info(path) == INFO

    def test_folder_means_its_flux_router(self, tmp_path: Path) -> None:
        path = write_router(tmp_path, LayerRouter(LAYERS, HEAD_DIM), INFO)
        assert path == tmp_path / "flux_router.safetensors"
        assert locate_router(tmp_path) == locate_router(path) == path
        assert read_info(tmp_path) == read_router(tmp_path)[1] == INFO

    def test_new_folders_are_made(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "r.safetensors"
        assert write_router(path, LayerRouter(LAYERS, HEAD_DIM), INFO) == path
        assert read_info(path) == INFO

    def test_file_is_readable_by_others(self, tmp_path: Path) -> None:
        path = write_router(tmp_path, LayerRouter(LAYERS, HEAD_DIM), INFO)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


class TestAtomicWrite:
    @pytest.fixture
    def old(self, tmp_path: Path) -> tuple[Path, bytes]:
        path = write_router(tmp_path, LayerRouter(LAYERS, HEAD_DIM), INFO)
        return path, path.read_bytes()

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=lambda e: e.__name__)
    def test_failure_while_writing(self, old, monkeypatch, error) -> None:
        path, content = old

        def write_half(_tensors, temporary, **_kwargs) -> None:
            Path(temporary).write_bytes(b"half")
            raise error("no space left")

        monkeypatch.setattr(checkpoint, "save_file", write_half)
        with pytest.raises(error):
            write_router(path, LayerRouter(LAYERS, HEAD_DIM), INFO)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]

    def test_failure_while_replacing(self, old, monkeypatch) -> None:
        path, content = old

        def refuse(*_args) -> None:
            raise PermissionError("not yours")

        monkeypatch.setattr(Path, "replace", refuse)
        with pytest.raises(PermissionError):
            write_router(path, LayerRouter(LAYERS, HEAD_DIM), INFO)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]

    def test_readers_never_see_a_part(self, old, monkeypatch) -> None:
        """Until the new file is complete, the old one is what a reader opens."""
        path, content = old
        save = checkpoint.save_file

        def observed(tensors, temporary, **kwargs) -> None:
            assert Path(temporary).parent == path.parent  # else replacing is a copy
            save(tensors, temporary, **kwargs)
            assert path.read_bytes() == content

        monkeypatch.setattr(checkpoint, "save_file", observed)
        router = LayerRouter(LAYERS, HEAD_DIM)
        write_router(path, router, INFO)
        assert torch.equal(read_router(path)[0].linear("head.2")[0], router.linear("head.2")[0])
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("size", [(LAYERS + 1, HEAD_DIM), (LAYERS, HEAD_DIM * 2)], ids=str)
    def test_router_and_info_disagree(self, old, size) -> None:
        path, content = old
        message = (
            f"expected a router of 3 layers with head_dim 4 as its info says, found {size[0]} "
            f"and {size[1]}"
        )
        with pytest.raises(RouterCheckpointError, match=f"^{message}$"):
            write_router(path, LayerRouter(*size), INFO)
        assert path.read_bytes() == content


class TestNotARouterFile:
    @pytest.mark.parametrize("read", [read_info, read_router], ids=["info", "router"])
    @pytest.mark.parametrize("place", ["file", "folder", "no-folder"])
    def test_nothing_there(self, tmp_path: Path, read: Callable, place: str) -> None:
        path = {
            "file": tmp_path / "r.safetensors",
            "folder": tmp_path,
            "no-folder": tmp_path / "none" / "r.safetensors",
        }[place]
        expected = path / "flux_router.safetensors" if place == "folder" else path
        refused(
            path,
            f"expected a router at {re.escape(str(expected))}, found nothing there; train one .*"
            r'\{"flux": \{"router": "PATH"\}\}.*"full", "sparse", "static".*',
            read,
        )

    @pytest.mark.parametrize("read", [read_info, read_router], ids=["info", "router"])
    @pytest.mark.parametrize("cut", ["0", "4", "8", "middle-of-header", "header", "data", "-1"])
    def test_truncated(self, tmp_path: Path, cut: str, read: Callable) -> None:
        path = write_raw(tmp_path / "r.safetensors")
        content = path.read_bytes()
        (header,) = struct.unpack("<Q", content[:8])
        ends = {"middle-of-header": 8 + header // 2, "header": 8 + header}
        ends |= {"data": 8 + header + 1000, "-1": len(content) - 1}
        path.write_bytes(content[: ends[cut] if cut in ends else int(cut)])
        refused(path, r".*: expected a safetensors file, found .*truncated, copy or write.*", read)

    @pytest.mark.parametrize("read", [read_info, read_router], ids=["info", "router"])
    @pytest.mark.parametrize(
        "content",
        [b"PK\x03\x04 a zip" * 99, b"{}", b"\x00" * 64, b"\xff" * 64],
        ids=["zip", "json", "zeros", "ones"],
    )
    def test_other_format(self, tmp_path: Path, content: bytes, read: Callable) -> None:
        path = tmp_path / "r.safetensors"
        path.write_bytes(content)
        refused(path, r".*: expected .*, found .*", read)

    def test_model_shard(self, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        save_file({"lm_head.weight": torch.zeros(2, 2)}, str(path))
        refused(
            path,
            r".*: expected format_version '1' in the metadata, found None; this is not a "
            r"Flux-vLLM router file, .*",
        )

    def test_version_of_the_future(self, tmp_path: Path) -> None:
        refused(
            write_raw(tmp_path / "r.safetensors", format_version="2"),
            r".*: expected format_version '1' in the metadata, found '2'; use the Flux-vLLM "
            r"version that wrote this file",
        )


class TestBadMetadata:
    @pytest.mark.parametrize("name", ["num_layers", "head_dim", "pool_tokens", "window_tokens"])
    @pytest.mark.parametrize(
        "value", [None, "", "0", "-3", "1.5", "many", "٣x", "9999999999", "1" * 5000], ids=repr
    )
    def test_out_of_bounds(self, tmp_path: Path, name: str, value: str | None) -> None:
        path = write_raw(tmp_path / "r.safetensors", **{name: value})
        most = {"num_layers": 1024, "head_dim": 4096}.get(name, 2**30)
        shown = re.escape(repr(value)[:60]) + (r"\.\.\." if len(repr(value)) > 60 else "")
        message = (
            rf".*: expected a whole number from 1 to {most} in the metadata field '{name}', found "
            rf"{shown}; write the file again"
        )
        refused(path, message, read_info)
        refused(path, message, read_router)

    @pytest.mark.parametrize("value", [None, "-1", "x"])
    def test_sink_tokens(self, tmp_path: Path, value: str | None) -> None:
        refused(
            write_raw(tmp_path / "r.safetensors", sink_tokens=value),
            rf".*: expected a whole number from 0 to {2**30} in the metadata field 'sink_tokens', "
            rf"found {value!r}; .*",
        )

    @pytest.mark.parametrize("value", [None, "xattn", "Streaming"])
    def test_sparse_pattern(self, tmp_path: Path, value: str | None) -> None:
        refused(
            write_raw(tmp_path / "r.safetensors", sparse_pattern=value),
            rf".*: expected sparse_pattern to be one of \['streaming', .*\], found {value!r}; "
            "retrain.*",
        )

    @pytest.mark.parametrize("value", ["", "False", "1"])
    def test_pool_prefix(self, tmp_path: Path, value: str) -> None:
        refused(
            write_raw(tmp_path / "r.safetensors", pool_prefix=value),
            rf".*: expected 'true' or 'false' in .* 'pool_prefix', found {value!r}; write the .*",
        )

    def test_pool_prefix_is_kept(self, tmp_path: Path) -> None:
        assert (
            read_info(write_raw(tmp_path / "r.safetensors", pool_prefix="false")).pool_prefix
            is False
        )
        assert read_info(write_raw(tmp_path / "r.safetensors", pool_prefix="true")).pool_prefix

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{'a': 1}", r"JSON in .* 'provenance', found text that does not parse \(.*\)"),
            ("[1]", r"a JSON object in the metadata field 'provenance', found \[1\]"),
        ],
    )
    def test_provenance(self, tmp_path: Path, text: str, message: str) -> None:
        path = write_raw(tmp_path / "r.safetensors", provenance=text)
        refused(path, rf".*: expected {message}; write the file again")


class TestBadTensors:
    def test_missing(self, tmp_path: Path) -> None:
        tensors = tensors_by_name()
        del tensors["layers.1.head.2.bias"]
        refused(
            write_raw(tmp_path / "r.safetensors", tensors),
            r".*: expected the 30 tensors of a router of 3 layers, found a file that lacks "
            r"layers\.1\.head\.2\.bias; write the file again",
        )

    def test_missing_layer_is_summed_up(self, tmp_path: Path) -> None:
        refused(
            write_raw(tmp_path / "r.safetensors", num_layers="4"),
            r".*: expected the 40 tensors of a router of 4 layers, found a file that lacks "
            r"layers\.3\.features\.0\.bias, layers\.3\.features\.0\.weight, "
            r"layers\.3\.features\.2\.bias and 7 more; .*",
        )

    def test_additional(self, tmp_path: Path) -> None:
        tensors = tensors_by_name() | {"layers.0.head.6.weight": torch.zeros(2, 2)}
        refused(
            write_raw(tmp_path / "r.safetensors", tensors),
            r".*: expected the 30 tensors of a router of 3 layers, found a file that also holds "
            r"layers\.0\.head\.6\.weight; .*",
        )

    def test_fewer_layers_said_than_held(self, tmp_path: Path) -> None:
        refused(
            write_raw(tmp_path / "r.safetensors", num_layers="2"),
            r".*: expected the 20 tensors of a router of 2 layers, found a file that also holds "
            r"layers\.2\..* and 7 more; .*",
        )

    @pytest.mark.parametrize(
        ("name", "wrong", "right"),
        [
            ("layers.2.features.0.weight", (4, 32), "[32, 4]"),
            ("layers.0.head.4.weight", (1, 4), "[2, 4]"),
            ("layers.1.head.4.bias", (), "[2]"),
            ("layers.1.head.2.bias", (4, 1), "[4]"),
        ],
        ids=lambda value: str(value),
    )
    def test_wrong_shape(self, tmp_path: Path, monkeypatch, name, wrong, right) -> None:
        """It is told from the file's header, before a network of the sizes it says is made."""
        monkeypatch.setattr(checkpoint, "LayerRouter", None)
        tensors = tensors_by_name() | {name: torch.zeros(wrong)}
        refused(
            write_raw(tmp_path / "r.safetensors", tensors),
            rf".*: expected {re.escape(name)} of shape {re.escape(right)} \(head_dim 4\), found "
            rf"{re.escape(str(list(wrong)))}; .*",
        )

    def test_other_head_dim_than_said(self, tmp_path: Path) -> None:
        refused(
            write_raw(tmp_path / "r.safetensors", head_dim="8"),
            r".*: expected layers\.0\.features\.0\.weight of shape \[64, 8\] \(head_dim 8\), "
            r"found \[32, 4\]; .*",
        )

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("name", ["layers.2.head.4.bias", "layers.0.features.2.weight"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_not_finite(self, tmp_path: Path, name: str, value: float, dtype) -> None:
        tensors = {n: t.to(dtype) for n, t in tensors_by_name().items()}
        tensors[name].view(-1)[-1] = value
        refused(
            write_raw(tmp_path / "r.safetensors", tensors),
            rf".*: expected finite numbers in {re.escape(name)}, found NaN or infinity; the "
            "training diverged, use an earlier checkpoint",
        )
