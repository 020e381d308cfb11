"""Where a router is found, and that no loader of weights which lists a folder finds it there.

Oracle: vLLM's own loaders, unpatched, on a folder without an index. Run:ai's streamer is played by
the listing that it does: every safetensors file of the folder itself.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router.place import beside_weights, find_router, locate_router, the_only

OLD = "flux_router.safetensors"
NEW = f"flux/{OLD}"


def _put(folder: Path, *places: str) -> None:
    for place in places:
        (folder / place).parent.mkdir(exist_ok=True)
        save_file({"layers.0.head.0.weight": torch.ones(2)}, str(folder / place))


@pytest.mark.parametrize("place", [OLD, NEW])
def test_router_in_a_folder(place: str, tmp_path: Path) -> None:
    _put(tmp_path, place)
    assert find_router(tmp_path) == locate_router(tmp_path) == tmp_path / place
    assert locate_router(tmp_path / place) == tmp_path / place


def test_folder_of_the_router_alone(tmp_path: Path) -> None:
    _put(tmp_path, NEW)
    assert locate_router(tmp_path / "flux") == beside_weights(tmp_path) == tmp_path / NEW


def test_two_routers_beside_the_weights(tmp_path: Path) -> None:
    _put(tmp_path, OLD, NEW)
    for find in (find_router, locate_router):
        with pytest.raises(RouterCheckpointError) as error:
            find(tmp_path)
        assert str(error.value) == (
            f"expected one router beside the weights, found {tmp_path / NEW} and {tmp_path / OLD}; "
            "remove the one that is not meant, or name the one that is as --additional-config "
            """'{"flux": {"router": "PATH"}}'"""
        )
    assert locate_router(tmp_path / OLD) == tmp_path / OLD  # named


def test_no_router(tmp_path: Path) -> None:
    assert find_router(tmp_path) is find_router(tmp_path / "model.gguf") is the_only([]) is None
    with pytest.raises(RouterCheckpointError, match=f"^expected a router at {tmp_path / NEW}, "):
        locate_router(tmp_path)


def _listed_by_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import default_loader

    name = "filter_duplicate_safetensors_files"  # which flux wraps, where it is in use
    monkeypatch.setattr(default_loader, name, inspect.unwrap(getattr(default_loader, name)))
    loader = default_loader.DefaultModelLoader(LoadConfig())
    found: Any = loader._prepare_weights(str(folder), None, None, True, None)
    return list(found[1])


def _listed_by_runai(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import runai_streamer_loader

    monkeypatch.setattr(
        runai_streamer_loader,
        "list_safetensors",
        lambda path: [str(file) for file in Path(path).glob("*.safetensors")],
    )
    loader = runai_streamer_loader.RunaiModelStreamerLoader(LoadConfig())
    return list(loader._prepare_weights(str(folder), None))


@pytest.mark.vllm
@pytest.mark.parametrize("listed", [_listed_by_default, _listed_by_runai])
def test_loaders_see_no_router(
    listed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [str(tmp_path / f"model-0000{i}-of-00002.safetensors") for i in (1, 2)]
    for shard in shards:
        save_file({"w": torch.ones(2)}, shard)
    _put(tmp_path, NEW)
    assert sorted(listed(tmp_path, monkeypatch)) == shards
    _put(tmp_path, OLD)  # where they do see it
    assert len(listed(tmp_path, monkeypatch)) == 3
