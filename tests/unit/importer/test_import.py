"""`flux-vllm import` on synthetic checkpoints with the authors' names and shapes.

Oracle: transformers' own models, whose weights and outputs must come back bit for bit, and a router
applied with torch.nn from the authors' tensors. `test_import_refusals.py` has what is refused.
"""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from flux_vllm.cli import main
from flux_vllm.errors import CheckpointImportError
from flux_vllm.importer import config as import_config
from flux_vllm.importer import weights as import_weights
from flux_vllm.importer.model import import_checkpoint
from flux_vllm.patterns import triangle, xattention
from flux_vllm.router.checkpoint import SPARSE_PATTERNS, read_info, read_router
from tests.helpers.paw import (
    ALLOCATOR,
    FIELDS,
    HEAD_DIM,
    LAYERS,
    tiny_checkpoint,
    write_checkpoint,
)

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def _tensors_of(folder: Path) -> Tensors:
    """Read a folder through its index, as a server does."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors: Tensors = {}
    for file in set(weight_map.values()):
        tensors |= load_file(folder / file)
    assert tensors.keys() == weight_map.keys()
    return tensors


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bf16": {"dtype": torch.bfloat16},
    "llama-fp16-router-fp32": {"dtype": torch.float16, "router_dtype": torch.float32},
    "llama-one-head-each": {"num_key_value_heads": 4},
    "llama-one-kv-head-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"config_class": Qwen3Config},
    "qwen3-tied-wide-heads": {
        "config_class": Qwen3Config,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
        "dtype": torch.bfloat16,
    },
}


@pytest.mark.parametrize("shards", [1, 3], ids=["single", "sharded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_import_gives_the_standard_model(variant: str, shards: int, tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path, **VARIANTS[variant])
    paw, out = write_checkpoint(tmp_path / "paw", config, tensors, shards), tmp_path / "out"
    before = {file.name: file.read_bytes() for file in paw.iterdir()}
    import_checkpoint(paw, out)
    standard = load_file(tmp_path / "standard" / "model.safetensors")
    written = _tensors_of(out)
    assert written.keys() == standard.keys()
    for name, tensor in standard.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in standard.values())
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "standard")
    assert type(model) is type(reference)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert {file.name: file.read_bytes() for file in paw.iterdir()} == before


def _authors_logits(tensors: Tensors, layer: int, pooled: torch.Tensor, logits: int) -> Any:
    """Apply one layer's router as the authors build it."""
    d = HEAD_DIM
    features = nn.Sequential(nn.Linear(d, 8 * d), nn.SiLU(), nn.Linear(8 * d, 2 * d))
    head = nn.Sequential(
        *(nn.Linear(2 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU()),
        nn.Linear(d, logits),
    )
    for name, network in (("cls_feat_extractor", features), ("cls_router_head_agnostic", head)):
        prefix = f"{ALLOCATOR.format(layer=layer)}{name}."
        network.load_state_dict(
            {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
        )
    with torch.no_grad():
        return head(features(pooled))


@pytest.mark.parametrize("shards", [1, 3], ids=["single", "sharded"])
@pytest.mark.parametrize("logits", [1, 2], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_import_router(dtype: torch.dtype, logits: int, shards: int, tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(
        tmp_path, dtype=torch.float16, router_dtype=dtype, logits=logits
    )
    import_checkpoint(write_checkpoint(tmp_path / "paw", config, tensors, shards), tmp_path / "out")
    router, info = read_router(tmp_path / "out")
    pooled = torch.randn(5, HEAD_DIM)
    for layer in range(LAYERS):
        expected = _authors_logits(tensors, layer, pooled, logits)
        p_full = expected.softmax(-1)[:, 1] if logits == 2 else expected[:, 0].sigmoid()
        found = router(layer, pooled).softmax(-1)[:, 1]
        torch.testing.assert_close(found, p_full)
    assert info.to_metadata() | {"provenance": ""} == {
        "format_version": "1",
        "base_model": "paw",
        "num_layers": str(LAYERS),
        "head_dim": str(HEAD_DIM),
        "pool_tokens": "100",
        "sink_tokens": "128",
        "window_tokens": "1024",
        "sparse_pattern": "streaming",
        "full_decode_tokens": "0",
        "probe": "[128, 128]",
        "provenance": "",
    }
    with safe_open(tmp_path / "out" / "flux/flux_router.safetensors", "pt") as file:
        assert file.get_tensor("layers.2.head.0.weight").dtype == dtype


def test_import_settings_from_config(tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    config |= {"sink_size": 4, "local_window_size": 1500, "pool_size": 150}
    report = import_checkpoint(
        write_checkpoint(tmp_path / "paw", config, tensors), tmp_path / "out"
    )
    info = read_info(tmp_path / "out")
    assert (info.sink_tokens, info.window_tokens, info.pool_tokens) == (128, 1536, 150)
    assert "sink_size 4 and local_window_size 1500 round up to 128 and 1536" in report.render()
    assert info.provenance["authors_fields"]["local_window_size"] == 1500


def test_import_defaults_are_the_authors_and_said(tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path, logits=1)
    for name in FIELDS.keys() - {"pooling_mode"}:
        del config[name]
    report = import_checkpoint(
        write_checkpoint(tmp_path / "paw", config, tensors), tmp_path / "out"
    )
    info = read_info(tmp_path / "out")
    assert (info.sink_tokens, info.window_tokens, info.pool_tokens) == (128, 1024, 100)
    (said,) = [line for line in report.assumed if "authors' defaults" in line]
    for name in ("toggle_type", "local_window_size", "sink_size", "pool_size", "use_softmax"):
        assert name in said


def test_import_config_is_standard(tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path, rms_norm_eps=3e-5)
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling.Paw"}, "torch_dtype": "bfloat16"}
    del config["head_dim"]
    report = import_checkpoint(
        write_checkpoint(tmp_path / "paw", config, tensors), tmp_path / "out"
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (FIELDS.keys() | {"auto_map"}) & written.keys()
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert (written["model_type"], written["head_dim"]) == ("llama", HEAD_DIM)
    assert (written["rms_norm_eps"], written["torch_dtype"]) == (3e-5, "bfloat16")
    assert "auto_map" in "".join(report.dropped)


def test_import_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    assert main(["import", str(paw), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for expected in (
        f"the router, {LAYERS} layers in F32: looks at the prompt's first and last 100 tokens",
        "SPARSE means streaming in prompts, the first 128 and the latest 1024 tokens in decode",
        "sparsity_lambda1_task",
        "attn_mask_log_alphas",
        "log_temp",
        "enable_ada_sparsity",
        "the checkpoint holds no tokenizer",
        f"flux-vllm serve {tmp_path / 'out'} --attention-backend flux",
    ):
        assert expected in shown
    report = json.loads((tmp_path / "out" / "flux_import.json").read_text())
    for kind in ("kept", "dropped", "assumed", "warnings"):
        assert all(f"- {line}" in shown for line in report[kind])
        assert report[kind]
    assert report["authors_fields"]["toggle_type"] == "streaming"


def test_import_copies_no_code(tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw, out = write_checkpoint(tmp_path / "paw", config, tensors), tmp_path / "out"
    wanted = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json"]
    wanted += ["chat_template.jinja", "LICENSE", "USE_POLICY.md", "merges.txt"]
    left = ["modeling_flash_llama.py", "LICENSE.py", "README.md", "optimizer.pt"]
    for name in wanted + left:
        (paw / name).write_text(f"text of {name}")
    (paw / "LICENSES").mkdir()
    report = import_checkpoint(paw, out)
    made = {"config.json", "flux_import.json", "flux", "model.safetensors"}
    assert {file.name for file in out.iterdir()} == made | {INDEX} | set(wanted)
    assert all((out / name).read_text() == f"text of {name}" for name in wanted)
    (said,) = [line for line in report.dropped if line.startswith("files")]
    assert said == f"files: {', '.join(sorted([*left, 'LICENSES']))}"
    assert not report.warnings
    assert [file.name for file in (out / "flux").iterdir()] == ["flux_router.safetensors"]
    for entry in (out, *out.rglob("*")):
        assert stat.S_IMODE(entry.stat().st_mode) == (0o755 if entry.is_dir() else 0o644)


IN_TOKENS = "sink and window are counted in tokens; the authors' kernel attends to whole blocks of"
TAIL = "the prompt's last 128 queries attend to everything"


@pytest.mark.parametrize(
    ("toggle_type", "pattern", "assumed"),
    [
        ("streaming", "streaming", f"streaming: {IN_TOKENS} 128"),
        (
            "triangle",
            "triangle",
            f"triangle: {TAIL}, before them {IN_TOKENS} 128",
        ),
        (
            "xattn",
            "xattention",
            "xattention: threshold 0.9, stride 16, norm 1; sink and window do not enter in prompts",
        ),
    ],
)
def test_import_pattern(toggle_type: str, pattern: str, assumed: str, tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config | {"toggle_type": toggle_type}, tensors)
    report = import_checkpoint(paw, tmp_path / "out")
    assert read_info(tmp_path / "out").sparse_pattern == pattern
    means = "in prompts, the first 128 and the latest 1024 tokens in decode"
    assert f"SPARSE means {pattern} {means}" in report.kept
    assert [line for line in report.assumed if "sink and window" in line] == [assumed]


def test_what_the_import_expects_is_what_is_served() -> None:
    served = xattention.Pattern(sink_tokens=128, window_tokens=1024)
    for prefix in ("xattn_", ""):
        assert import_config.XATTENTION[f"{prefix}threshold"] == served.threshold
        assert import_config.XATTENTION[f"{prefix}stride"] == served.stride
    assert triangle.Pattern(sink_tokens=128, window_tokens=1024).tail_tokens == 128


@pytest.mark.parametrize(
    "fields",
    [
        {"xattn_threshold": 0.9, "xattn_stride": 16, "xattn_norm": 1},
        {"threshold": 0.9, "stride": 16},
    ],
)
def test_import_takes_the_xattention_that_is_served(fields: dict[str, Any], tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    config |= {"toggle_type": "xattn"} | fields
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    report = import_checkpoint(paw, tmp_path / "out")
    assert not any("not known" in warning for warning in report.warnings)
    assert fields.items() <= report.authors_fields.items()
    assert not fields.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


def test_import_without_xattention_has_no_use_for_its_fields(tmp_path: Path) -> None:
    """But a threshold that is not said to be of xattention may be of the router."""
    config, tensors = tiny_checkpoint(tmp_path)
    config |= {"xattn_threshold": 0.8, "xattn_stride": 8, "threshold": 0.4}
    report = import_checkpoint(
        write_checkpoint(tmp_path / "paw", config, tensors), tmp_path / "out"
    )
    (said,) = [warning for warning in report.warnings if "not known" in warning]
    assert "here: threshold;" in said
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.keys() & {"xattn_threshold", "xattn_stride", "threshold"} == {"threshold"}


def test_import_drops_fields_of_training(tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    training: dict[str, Any] = {
        "enable_layerwise_sparsity": True,
        "layerwise_sparsity_schedule": "linear",
        "layerwise_sparsity_min_ratio": 0.5,
        "erank_analysis_path": None,
        "suggested_threshold": 0.5,
    }
    paw = write_checkpoint(tmp_path / "paw", config | training, tensors)
    report = import_checkpoint(paw, tmp_path / "out")
    assert not any("not known" in warning for warning in report.warnings)
    (dropped,) = [line for line in report.dropped if line.startswith("fields of config.json")]
    assert all(name in dropped for name in training)
    assert not training.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


def test_every_pattern_of_the_authors_is_served() -> None:
    assert set(import_config.PATTERNS.values()) <= set(SPARSE_PATTERNS)


def test_import_warns_of_unknown_fields(tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "known", config, tensors)
    report = import_checkpoint(paw, tmp_path / "out")
    assert not any("not known" in warning for warning in report.warnings)
    config |= {"router_temperature": 2.0}
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    report = import_checkpoint(paw, tmp_path / "again")
    assert any("router_temperature" in warning for warning in report.warnings)


def test_import_streams_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is made of more than one shard, and none of the shard that holds only the router."""
    config, tensors = tiny_checkpoint(tmp_path)
    weights = load_file(tmp_path / "standard" / "model.safetensors")
    paw = write_checkpoint(tmp_path / "paw", config, weights, shards=2)
    index = json.loads((paw / INDEX).read_text())
    places = dict(index["weight_map"])
    router = {name: tensor for name, tensor in tensors.items() if name not in weights}
    save_file(router, paw / "router.safetensors")
    index["weight_map"] |= dict.fromkeys(router, "router.safetensors")
    (paw / INDEX).write_text(json.dumps(index))
    sources: list[set[str]] = []

    def save(part: Tensors, *args: Any, **kwargs: Any) -> None:
        sources.append({places[name] for name in part})
        save_file(part, *args, **kwargs)

    monkeypatch.setattr(import_weights, "save_file", save)
    import_checkpoint(paw, tmp_path / "out")
    assert sources == [{file} for file in sorted(set(places.values()))]
    written = set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values())
    assert written == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert {file.name for file in (tmp_path / "out").glob("model*.safetensors")} == written


def test_import_hub_cache(tmp_path: Path) -> None:
    """Shards of a hub's cache are links; the copy holds files of its own, and the hub's name."""
    config, tensors = tiny_checkpoint(tmp_path)
    blobs = write_checkpoint(tmp_path / "blobs", config, tensors, shards=3)
    snapshot = tmp_path / "models--QQ--full_streaming" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    report = import_checkpoint(snapshot, tmp_path / "out")
    assert report.checkpoint == read_info(tmp_path / "out").base_model == "QQ/full_streaming"
    shutil.rmtree(blobs)
    assert _tensors_of(tmp_path / "out").keys() < tensors.keys()
    with pytest.raises(CheckpointImportError, match="shards that|JSON file"):
        import_checkpoint(snapshot, tmp_path / "again")


def test_import_tied_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_weights, "_ROWS", 7)
    config, tensors = tiny_checkpoint(tmp_path, Qwen3Config, tie_word_embeddings=True)
    head = tensors["model.embed_tokens.weight"].clone()
    paw = write_checkpoint(tmp_path / "paw", config, tensors | {"lm_head.weight": head}, 3)
    report = import_checkpoint(paw, tmp_path / "out")
    assert "lm_head.weight" not in _tensors_of(tmp_path / "out")
    assert any(line.startswith("lm_head.weight") for line in report.dropped)
    head[-1, 3] += 1
    paw = write_checkpoint(tmp_path / "other", config, tensors | {"lm_head.weight": head}, 3)
    with pytest.raises(CheckpointImportError, match="found another matrix"):
        import_checkpoint(paw, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("kind", ["new", "nested", "empty", "link"])
def test_import_makes_out(kind: str, tmp_path: Path) -> None:
    config, tensors = tiny_checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    out = tmp_path / "a" / "b" / "out" if kind == "nested" else tmp_path / "out"
    if kind in ("empty", "link"):
        out.mkdir()
    given = tmp_path / "link"
    given.symlink_to(out)
    import_checkpoint(paw, given if kind == "link" else out)
    assert (given / "config.json").is_file()
    assert sorted(folder.name for folder in out.parent.glob(".*")) == []
