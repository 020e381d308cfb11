"""Router files: what is written comes back bit for bit.

Oracle: safetensors' own reader and writer, with tensor names and shapes spelled out from
docs/CONFIGURATION.md. Pinned: a failed write leaves the old file and no temporary one. Broken files
are in test_checkpoint_refusals.py.
"""

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router import checkpoint
from flux_vllm.router.checkpoint import (
    RouterInfo,
    read_info,
    read_router,
    write_router,
)
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route, choose_route, full_probability
from tests.unit.router.router_files import (
    HEAD_DIM,
    LAYERS,
    METADATA,
    SHAPES,
    tensors_by_name,
    write_raw,
)

INFO = RouterInfo(
    base_model="org/Model-1B",
    num_layers=LAYERS,
    head_dim=HEAD_DIM,
    pool_tokens=48,
    sink_tokens=0,
    window_tokens=256,
    provenance={"steps": 300, "when": "2026-04-04", "data": ["a", {"b": 1.5}]},
)


POOLED = replace(
    INFO,
    probe=(32, 64),
    pools=("tail:1", "head:32"),
    context_layers=(1, 2),
    widths=(5, 6, 7, 8),
)


class TestPoolsAndWidths:
    """Files of format 2: what the routers look at, and their sizes."""

    def test_round_trip(self, tmp_path: Path) -> None:
        router = POOLED.make_router()
        path = write_router(tmp_path / "r.safetensors", router, POOLED)
        found, info = read_router(path)
        assert info == POOLED
        assert info.inputs.vectors == 6
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            assert file.get_slice("layers.2.features.0.weight").get_shape() == [5, 24]
            assert file.get_slice("layers.0.head.4.weight").get_shape() == [2, 8]
        assert {name: metadata[name] for name in ("format_version", "pools", "widths")} == {
            "format_version": "2",
            "pools": '["tail:1", "head:32"]',
            "widths": "[5, 6, 7, 8]",
        }
        x = torch.randn(LAYERS, 2, 24)
        assert torch.equal(found.forward_all(x), router.forward_all(x))

    def test_an_old_file_has_one_pool(self, tmp_path: Path) -> None:
        old = write_raw(tmp_path / "old.safetensors", pool_tokens="200", pool_prefix="false")
        inputs = read_router(old)[1].inputs
        assert (list(map(str, inputs.pools)), inputs.vectors) == (["tail:200"], 1)
        assert inputs.probe.tail_tokens == 200  # as many as it pools
        both = write_raw(tmp_path / "both.safetensors")
        assert list(map(str, read_router(both)[1].inputs.pools)) == ["ends:48"]

    def test_other_sizes_than_its_info_says(self, tmp_path: Path) -> None:
        with pytest.raises(RouterCheckpointError, match="or other inputs or widths"):
            write_router(tmp_path, LayerRouter(LAYERS, HEAD_DIM), POOLED)


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
        assert metadata == METADATA | {"probe": "[128, 128]", "full_decode_tokens": "0"}
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
            f"and {size[1]}, or other inputs or widths"
        )
        with pytest.raises(RouterCheckpointError, match=f"^{message}$"):
            write_router(path, LayerRouter(*size), INFO)
        assert path.read_bytes() == content


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_always_sparse_layers_stay_so(tmp_path: Path, dtype: torch.dtype) -> None:
    """Whatever their tensors say: keys that nobody reads are given back for good."""
    info = replace(INFO, always_sparse=(0, 2))
    write_router(tmp_path, LayerRouter(INFO.num_layers, INFO.head_dim), info)
    router, found = read_router(tmp_path)
    assert found.always_sparse == (0, 2)
    router = router.to(dtype)
    features = 1e3 * torch.randn(100, INFO.head_dim, dtype=dtype)
    features[7] = float("nan")
    together = router.forward_all(features.expand(INFO.num_layers, -1, -1))
    for layer in range(INFO.num_layers):
        probability = full_probability(router(layer, features))
        assert torch.equal(probability.isnan(), full_probability(together[layer]).isnan())
        routes = choose_route(probability, 1e-6)
        if layer in (0, 2):
            assert (probability == 0).all()
            assert (routes == Route.SPARSE).all()
        else:
            assert (routes == Route.FULL).any()


def test_freeing_order_is_kept(tmp_path: Path) -> None:
    order = tuple(reversed(range(INFO.num_layers)))
    router = LayerRouter(INFO.num_layers, INFO.head_dim)
    for found in (order, ()):
        write_router(tmp_path, router, replace(INFO, freeing_order=found))
        assert read_router(tmp_path)[1].freeing_order == found


def test_full_decode_tokens_are_kept(tmp_path: Path) -> None:
    router = LayerRouter(INFO.num_layers, INFO.head_dim)
    info = replace(INFO, full_decode_tokens=32)
    write_router(tmp_path, router, info)
    assert read_router(tmp_path)[1] == info
    # A file that is older than the field.
    metadata = info.to_metadata()
    del metadata["full_decode_tokens"]
    assert RouterInfo.from_metadata(metadata, tmp_path).full_decode_tokens == 0


def test_always_sparse_beyond_the_model(tmp_path: Path) -> None:
    info = replace(INFO, always_sparse=(INFO.num_layers,))
    with pytest.raises(RouterCheckpointError, match="always_sparse below num_layers "):
        write_router(tmp_path, LayerRouter(INFO.num_layers, INFO.head_dim), info)
