"""Files that are no router, or a broken one: each way to be broken has its message.

Oracle: safetensors' own writer; the messages, spelled out.
"""

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router import checkpoint
from flux_vllm.router.checkpoint import read_info, read_router
from tests.unit.router.router_files import tensors_by_name, write_raw


def refused(path: Path, message: str, read: Callable = read_router) -> None:
    with pytest.raises(RouterCheckpointError) as error:
        read(path)
    assert re.fullmatch(message, str(error.value), flags=re.DOTALL), str(error.value)
    assert str(path) in str(error.value)


class TestNotARouterFile:
    @pytest.mark.parametrize("read", [read_info, read_router], ids=["info", "router"])
    @pytest.mark.parametrize("place", ["file", "folder", "no-folder"])
    def test_nothing_there(self, tmp_path: Path, read: Callable, place: str) -> None:
        path = {
            "file": tmp_path / "r.safetensors",
            "folder": tmp_path,
            "no-folder": tmp_path / "none" / "r.safetensors",
        }[place]
        expected = path / "flux/flux_router.safetensors" if place == "folder" else path
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
            r".*: expected format_version 1 or 2 in the metadata, found None; this is not a "
            r"Flux-vLLM router file, .*",
        )

    def test_version_of_the_future(self, tmp_path: Path) -> None:
        refused(
            write_raw(tmp_path / "r.safetensors", format_version="3"),
            r".*: expected format_version 1 or 2 in the metadata, found '3'; use the Flux-vLLM "
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


class TestInputs:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            (
                "pools",
                '["tail:x"]',
                r".*head:TOKENS, tail:TOKENS, ends:TOKENS or overlap:TOKENS .*'tail:x'.*",
            ),
            ("pools", '["tail:129"]', r".*at most 128 tokens \(tail\), .*found tail:129.*"),
            (
                "pools",
                "[1]",
                r".*a JSON list of texts .*'pools', found '\[1\]'.*",
            ),
            ("pools", "tail:16", r".*a JSON list of texts.*"),
            ("probe", "[128]", r".*two token counts, head and tail, found \(128,\).*"),
            ("probe", "[]", r".*two token counts, head and tail, found \(\).*"),
            ("probe", "[-1, 4]", r".*a JSON list of whole numbers in .*'probe'.*"),
            ("widths", "[8, 8]", r".*no or four widths.*found .*widths \(8, 8\).*"),
            ("widths", "[8, 8, 0, 8]", r".*no or four widths.*"),
            ("widths", "[8, 8, 9999999, 8]", r".*sizes of at most 1048576.*"),
            ("context_layers", "[3]", r".*context_layers and .* below num_layers \(3\).*"),
            ("always_sparse", "[3]", r".*and always_sparse below num_layers \(3\).*"),
            ("always_sparse", '["a"]', r".*a JSON list of whole numbers in .*'always_sparse'.*"),
            (
                "freeing_order",
                "[0, 2]",
                r".*each of 3 layers once in freeing_order, found \(0, 2\).*",
            ),
            ("freeing_order", "[0, 1, 1]", r".*each of 3 layers once in freeing_order.*"),
        ],
    )
    def test_refused(self, tmp_path: Path, field: str, value: str, message: str) -> None:
        refused(write_raw(tmp_path / "r.safetensors", **{field: value}), message)
