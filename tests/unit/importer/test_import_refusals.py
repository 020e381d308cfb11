"""What `flux-vllm import` refuses: configurations, tensors, files, folders, a full disk.

Oracle: the message names what was changed in a checkpoint that is otherwise imported. Pinned:
whatever is refused leaves nothing behind.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_vllm.errors import CheckpointImportError, RouterCheckpointError
from flux_vllm.importer import model as import_model
from flux_vllm.importer import weights as import_weights
from flux_vllm.importer.model import import_checkpoint
from tests.helpers.paw import ALLOCATOR, HEAD_DIM, LAYERS, tiny_checkpoint, write_checkpoint

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def _is_empty(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "standard": ({"architectures": ["LlamaForCausalLM"]}, "only published Flux-Attention"),
    "other": ({"architectures": ["PawPhi3ForCausalLM"]}, "found ['PawPhi3ForCausalLM']"),
    "no-architecture": ({"architectures": None}, "found None"),
    "toggle": ({"toggle_type": "topk"}, "expected toggle_type 'streaming'"),
    "retrieval-xattn": ({"retrieval_mode": "xattn"}, "expected retrieval_mode 'full'"),
    "retrieval-triangle": ({"retrieval_mode": "triangle"}, "found 'triangle'"),
    "pooling": ({"pooling_mode": "first_token"}, "expected pooling_mode 'ctx_q'"),
    "triangle-length": (
        {"toggle_type": "triangle", "triangle_n_last": 64},
        "expected triangle_n_last 128",
    ),
    "xattn-threshold": (
        {"toggle_type": "xattn", "xattn_threshold": 0.8},
        "expected xattn_threshold 0.9 in config.json, found 0.8",
    ),
    "xattn-stride": ({"toggle_type": "xattn", "xattn_stride": 8}, "expected xattn_stride 16"),
    "xattn-norm": ({"toggle_type": "xattn", "xattn_norm": 2}, "expected xattn_norm 1"),
    "threshold": ({"toggle_type": "xattn", "threshold": 0.95}, "expected threshold 0.9"),
    "stride": ({"toggle_type": "xattn", "stride": None}, "expected stride 16"),
    "softmax-text": ({"use_softmax": "yes"}, "expected true or false as use_softmax"),
    "one-logit-said": ({"use_softmax": False}, "of shape [1, 4]"),
    "pool": ({"pool_size": 0}, "from 1 to"),
    "window": ({"local_window_size": 10.5}, "found 10.5"),
    "sink": ({"sink_size": True}, "found True"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "no-size": ({"hidden_size": None}, "hidden_size"),
    "fewer-layers": ({"num_hidden_layers": LAYERS - 1}, "also holds model.layers.2."),
    "more-layers": ({"num_hidden_layers": LAYERS + 1}, "lacks model.layers.3."),
    "heads": ({"num_attention_heads": 2}, "self_attn.q_proj.weight of shape [8, 16]"),
    "vocabulary": ({"vocab_size": 41}, "embed_tokens.weight of shape [41, 16]"),
    "untied": ({"architectures": ["PawQwen3ForCausalLM"]}, "lacks model.layers.0.self_attn.k_norm"),
    "biases": ({"attention_bias": True}, "lacks model.layers.0.self_attn.k_proj.bias"),
    "quantized": ({"quantization_config": {"bits": 4}}, "without quantization_config"),
    "sliding": ({"use_sliding_window": True}, "without use_sliding_window"),
    "layer-types": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types of full_attention alone",
    ),
    "layer-types-number": (
        {"layer_types": 5},
        "expected layer_types with a name for each of 3 layers in config.json, found 5",
    ),
    "layer-types-false": ({"layer_types": False}, "each of 3 layers in config.json, found False"),
    "layer-types-lists": ({"layer_types": [["a"]] * LAYERS}, "found [['a'], ['a'], ['a']]"),
    "layer-types-fewer": (
        {"layer_types": ["full_attention"] * (LAYERS - 1)},
        "each of 3 layers in config.json",
    ),
    "head-dim": ({"head_dim": 0}, "head_dim in config.json, found 0"),
    "uneven-groups": ({"num_key_value_heads": 3}, "found 4 and 3"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_import_refuses_config(case: str, tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    change, message = CONFIGS[case]
    paw = write_checkpoint(tmp_path / "paw", config | change, tensors)
    _refused(paw, tmp_path / "there" / "out", message)


def _without(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def _with(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


_EXTRACTOR = f"{ALLOCATOR.format(layer=1)}cls_feat_extractor.0.weight"
TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no-weight": (_without("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up"),
    "no-head": (_without("lm_head.weight"), "lacks lm_head.weight"),
    "no-router": (_without(_EXTRACTOR), f"lacks {_EXTRACTOR}"),
    "task-embedding": (
        _with(f"{ALLOCATOR.format(layer=0)}task_embedding.weight", torch.zeros(4, HEAD_DIM)),
        "also holds model.layers.0.self_attn.mask_allocator.task_embedding.weight",
    ),
    "unknown": (_with("model.layers.0.self_attn.sinks", torch.zeros(4)), "also holds"),
    "lookalike": (_with("model.layers.0.sparsity_lambda1_task", torch.zeros(4)), "also holds"),
    "router-shape": (_with(_EXTRACTOR, torch.zeros(16, HEAD_DIM)), "of shape [32, 4]"),
    "weight-shape": (_with("model.norm.weight", torch.zeros(17)), "found [17]"),
    "weight-dtype": (
        _with("model.norm.weight", torch.zeros(16, dtype=torch.float64)),
        "found F64",
    ),
    "router-dtype": (_with(_EXTRACTOR, torch.zeros(32, HEAD_DIM, dtype=torch.int8)), "found I8"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_import_refuses_tensors(case: str, tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    change, message = TENSORS[case]
    change(tensors)
    paw = write_checkpoint(tmp_path / "paw", config, tensors, shards=3)
    _refused(paw, tmp_path / "there" / "out", message)


def _refused(paw: Path, out: Path, message: str) -> None:
    with pytest.raises(CheckpointImportError) as refusal:
        import_checkpoint(paw, out)
    assert message in str(refusal.value)
    assert not out.parent.exists() or not any(out.parent.iterdir())


def _truncate(paw: Path) -> None:
    (paw / SHARD).write_bytes((paw / SHARD).read_bytes()[:-10])


def _edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def damage(paw: Path) -> None:
        index = json.loads((paw / INDEX).read_text())
        change(index["weight_map"])
        (paw / INDEX).write_text(json.dumps(index))

    return damage


def _extra_tensor(paw: Path) -> None:
    save_file(load_file(paw / SHARD) | {"lm_head.weight": torch.zeros(40, 16)}, paw / SHARD)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-shard": (lambda paw: (paw / SHARD).unlink(), f"missing: {SHARD}"),
    "truncated": (_truncate, "expected a whole safetensors file"),
    "no-header": (lambda paw: (paw / SHARD).write_bytes(b"<html>"), "whole safetensors file"),
    "index-elsewhere": (
        _edit_index(lambda places: places.update({"model.norm.weight": "../x.safetensors"})),
        "to files of the same folder",
    ),
    "index-names-more": (
        _edit_index(lambda places: places.update({"x": SHARD})),
        "found none of x",
    ),
    "index-names-fewer": (_edit_index(lambda places: places.pop("model.norm.weight")), "norm"),
    "twice": (_extra_tensor, "found in it also lm_head.weight"),
    "two-sets": (lambda paw: save_file({}, paw / "model.safetensors"), "one set of weights"),
    "no-index": (lambda paw: (paw / INDEX).unlink(), "model.safetensors"),
    "bad-index": (lambda paw: (paw / INDEX).write_text("{"), "expected a JSON file"),
    "no-map": (lambda paw: (paw / INDEX).write_text("{}"), "expected a weight_map"),
    "bad-config": (lambda paw: (paw / "config.json").write_text("[]"), "expected a JSON object"),
    "no-config": (lambda paw: (paw / "config.json").unlink(), "config.json"),
    "nested-config": (
        lambda paw: (paw / "config.json").write_text('{"a":' * 100_000),
        "config.json, found more; download it again",
    ),
    # Can be read, and not be written.
    "nested-index": (
        lambda paw: (paw / INDEX).write_text('{"a":' * 600 + "{}" + "}" * 600),
        f"{INDEX}, found more; download it again",
    ),
    "no-tokenizer-blob": (
        lambda paw: (paw / "tokenizer.json").symlink_to("../blobs/0a1b"),
        "tokenizer.json, found a link to nothing",
    ),
    "nothing": (shutil.rmtree, "expected the folder of a Flux-Attention checkpoint"),
}


@pytest.mark.parametrize("case", FILES)
def test_import_refuses_files(case: str, tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors, shards=3)
    damage, message = FILES[case]
    damage(paw)
    _refused(paw, tmp_path / "there" / "out", message)


def test_import_refuses_out_in_use(tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    (tmp_path / "link").symlink_to(paw)
    for out in (paw, tmp_path / "link", tmp_path / "paw" / ".." / "paw", paw / "out"):
        with pytest.raises(CheckpointImportError, match="another folder than CHECKPOINT"):
            import_checkpoint(paw, out)
    with pytest.raises(CheckpointImportError, match="found a folder with files in it"):
        import_checkpoint(paw, tmp_path / "standard")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CheckpointImportError, match="found a file"):
        import_checkpoint(paw, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("free", [1000, import_model._SPARE_BYTES])
def test_import_refuses_a_full_disk(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _refused(paw, tmp_path / "there" / "out", f"found {free / 1e9:.1f} GB")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_import_failing_midway_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors, shards=3)
    calls = 0

    def save(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        save_file(*args, **kwargs)

    monkeypatch.setattr(import_weights, "save_file", save)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointImportError
    with pytest.raises(expected):
        import_checkpoint(paw, tmp_path / "there" / "out")
    assert calls == 2
    assert _is_empty(tmp_path / "there")


def test_import_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    script = (
        "import os, signal; from flux_vllm.cli import main\n"
        "from flux_vllm.importer import weights\n"
        "weights.save_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"main(['import', {str(paw)!r}, {str(tmp_path / 'there' / 'out')!r}])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "interrupted" in ended.stderr, ended.stderr
    assert _is_empty(tmp_path / "there")


def test_import_refuses_a_diverged_router(tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    tensors[_EXTRACTOR][3, 1] = math.nan
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    with pytest.raises(RouterCheckpointError, match=r"finite numbers in layers\.1\.features\.0"):
        import_checkpoint(paw, tmp_path / "there" / "out")
    assert _is_empty(tmp_path / "there")
