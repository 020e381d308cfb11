"""`flux-vllm import` on synthetic checkpoints with the authors' names and shapes.

Oracle: transformers' own models, whose weights and outputs must come back bit for bit, and a router
applied with torch.nn from the authors' tensors. Pinned: whatever is refused leaves nothing behind.
"""

import json
import math
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from flux_vllm.cli import import_config, import_weights, main
from flux_vllm.cli.console import CommandError
from flux_vllm.cli.import_model import import_checkpoint
from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router import checkpoint as router_checkpoint
from flux_vllm.router.checkpoint import read_info, read_router
from tests.helpers.paw import (
    ALLOCATOR,
    FIELDS,
    paw_config,
    random_allocators,
    training_leftovers,
    write_checkpoint,
)

LAYERS, HEAD_DIM = 3, 4
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
Checkpoint = tuple[dict[str, Any], Tensors]


def _checkpoint(
    folder: Path,
    config_class: Any = LlamaConfig,
    dtype: torch.dtype = torch.float32,
    logits: int = 2,
    router_dtype: torch.dtype | None = None,
    **config: Any,
) -> Checkpoint:
    """Make a tiny model; give its configuration and tensors as the authors would store them."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": 40,
        "pad_token_id": None,
    }
    made = config_class(**sizes | config)
    model = AutoModelForCausalLM.from_config(made, dtype=dtype)
    model.save_pretrained(folder / "standard")
    tensors = load_file(folder / "standard" / "model.safetensors")
    tensors |= random_allocators(LAYERS, HEAD_DIM, logits, router_dtype or dtype)
    tensors |= training_leftovers(LAYERS, made.num_key_value_heads)
    return paw_config(folder / "standard", use_softmax=logits == 2), tensors


def _tensors_of(folder: Path) -> Tensors:
    """Read a folder through its index, as a server does."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors: Tensors = {}
    for file in set(weight_map.values()):
        tensors |= load_file(folder / file)
    assert tensors.keys() == weight_map.keys()
    return tensors


def _is_empty(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


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
    config, tensors = _checkpoint(tmp_path, **VARIANTS[variant])
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
    config, tensors = _checkpoint(tmp_path, dtype=torch.float16, router_dtype=dtype, logits=logits)
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
        "provenance": "",
    }
    with safe_open(tmp_path / "out" / "flux_router.safetensors", "pt") as file:
        assert file.get_tensor("layers.2.head.0.weight").dtype == dtype


def test_import_settings_from_config(tmp_path: Path) -> None:
    config, tensors = _checkpoint(tmp_path)
    config |= {"sink_size": 4, "local_window_size": 1500, "pool_size": 150}
    report = import_checkpoint(
        write_checkpoint(tmp_path / "paw", config, tensors), tmp_path / "out"
    )
    info = read_info(tmp_path / "out")
    assert (info.sink_tokens, info.window_tokens, info.pool_tokens) == (128, 1536, 150)
    assert "sink_size 4 and local_window_size 1500 round up to 128 and 1536" in report.render()
    assert info.provenance["authors_fields"]["local_window_size"] == 1500


def test_import_defaults_are_the_authors_and_said(tmp_path: Path) -> None:
    config, tensors = _checkpoint(tmp_path, logits=1)
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
    config, tensors = _checkpoint(tmp_path, rms_norm_eps=3e-5)
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
    config, tensors = _checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    assert main(["import", str(paw), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for expected in (
        f"the router, {LAYERS} layers in F32: looks at the prompt's first and last 100 tokens",
        "streaming: the first 128 and the latest 1024 tokens",
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
    config, tensors = _checkpoint(tmp_path)
    paw, out = write_checkpoint(tmp_path / "paw", config, tensors), tmp_path / "out"
    wanted = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json"]
    wanted += ["chat_template.jinja", "LICENSE", "USE_POLICY.md", "merges.txt"]
    left = ["modeling_flash_llama.py", "LICENSE.py", "README.md", "optimizer.pt"]
    for name in wanted + left:
        (paw / name).write_text(f"text of {name}")
    (paw / "LICENSES").mkdir()
    report = import_checkpoint(paw, out)
    made = {"config.json", "flux_import.json", "flux_router.safetensors", "model.safetensors"}
    assert {file.name for file in out.iterdir()} == made | {INDEX} | set(wanted)
    assert all((out / name).read_text() == f"text of {name}" for name in wanted)
    (said,) = [line for line in report.dropped if line.startswith("files")]
    assert all(name in said for name in [*left, "LICENSES"])
    assert not report.warnings
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o644}
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


@pytest.mark.parametrize("toggle_type", ["xattn", "triangle"])
def test_import_other_pattern(
    toggle_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = _checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config | {"toggle_type": toggle_type}, tensors)
    out = tmp_path / "out"
    if import_config.PATTERNS[toggle_type] not in router_checkpoint.SPARSE_PATTERNS:
        assert main(["import", str(paw), str(out)]) == 1
        error = capsys.readouterr().err
        assert repr(toggle_type) in error
        assert "--as-streaming" in error
        assert not out.exists()
    assert main(["import", str(paw), str(out), "--as-streaming"]) == 0
    assert "WARNING" in (shown := capsys.readouterr().out)
    assert "prefill differs" in shown
    info = read_info(out)
    assert info.sparse_pattern == "streaming"
    assert "prefill differs" in str(info.provenance["warning"])
    assert main(["inspect", str(out)]) == 0
    assert "prefill differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("toggle_type", "pattern"), [("xattn", "xattention"), ("triangle", "triangle")]
)
def test_import_writes_a_pattern_that_is_served(
    toggle_type: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (import_config, router_checkpoint):
        monkeypatch.setattr(module, "SPARSE_PATTERNS", ("streaming", pattern))
    config, tensors = _checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config | {"toggle_type": toggle_type}, tensors)
    report = import_checkpoint(paw, tmp_path / "out")
    info = read_info(tmp_path / "out")
    assert info.sparse_pattern == pattern
    assert "warning" not in info.provenance
    assert not any("prefill" in line for line in report.warnings)


def test_import_streams_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is made of more than one shard, and none of the shard that holds only the router."""
    config, tensors = _checkpoint(tmp_path)
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
    config, tensors = _checkpoint(tmp_path)
    blobs = write_checkpoint(tmp_path / "blobs", config, tensors, shards=3)
    snapshot = tmp_path / "models--QQ--full_streaming" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    report = import_checkpoint(snapshot, tmp_path / "out")
    assert report.checkpoint == read_info(tmp_path / "out").base_model == "QQ/full_streaming"
    shutil.rmtree(blobs)
    assert _tensors_of(tmp_path / "out").keys() < tensors.keys()
    with pytest.raises(CommandError, match="shards that|JSON file"):
        import_checkpoint(snapshot, tmp_path / "again")


def test_import_tied_head(tmp_path: Path) -> None:
    config, tensors = _checkpoint(tmp_path, Qwen3Config, tie_word_embeddings=True)
    head = tensors["model.embed_tokens.weight"].clone()
    paw = write_checkpoint(tmp_path / "paw", config, tensors | {"lm_head.weight": head}, 3)
    report = import_checkpoint(paw, tmp_path / "out")
    assert "lm_head.weight" not in _tensors_of(tmp_path / "out")
    assert any(line.startswith("lm_head.weight") for line in report.dropped)
    head[-1, 3] += 1
    paw = write_checkpoint(tmp_path / "other", config, tensors | {"lm_head.weight": head}, 3)
    with pytest.raises(CommandError, match="found another matrix"):
        import_checkpoint(paw, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


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
}


@pytest.mark.parametrize("case", CONFIGS)
def test_import_refuses_config(case: str, tmp_path: Path) -> None:
    config, tensors = _checkpoint(tmp_path)
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
    config, tensors = _checkpoint(tmp_path)
    change, message = TENSORS[case]
    change(tensors)
    paw = write_checkpoint(tmp_path / "paw", config, tensors, shards=3)
    _refused(paw, tmp_path / "there" / "out", message)


def _refused(paw: Path, out: Path, message: str) -> None:
    with pytest.raises(CommandError) as refusal:
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
    "nothing": (shutil.rmtree, "expected the folder of a Flux-Attention checkpoint"),
}


@pytest.mark.parametrize("case", FILES)
def test_import_refuses_files(case: str, tmp_path: Path) -> None:
    config, tensors = _checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors, shards=3)
    damage, message = FILES[case]
    damage(paw)
    _refused(paw, tmp_path / "there" / "out", message)


def test_import_refuses_out_in_use(tmp_path: Path) -> None:
    config, tensors = _checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    (tmp_path / "link").symlink_to(paw)
    for out in (paw, tmp_path / "link", tmp_path / "paw" / ".." / "paw"):
        with pytest.raises(CommandError, match="another folder than CHECKPOINT"):
            import_checkpoint(paw, out)
    with pytest.raises(CommandError, match="found a folder with files in it"):
        import_checkpoint(paw, tmp_path / "standard")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CommandError, match="found a file"):
        import_checkpoint(paw, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("kind", ["new", "nested", "empty", "link"])
def test_import_makes_out(kind: str, tmp_path: Path) -> None:
    config, tensors = _checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    out = tmp_path / "a" / "b" / "out" if kind == "nested" else tmp_path / "out"
    if kind in ("empty", "link"):
        out.mkdir()
    given = tmp_path / "link"
    given.symlink_to(out)
    import_checkpoint(paw, given if kind == "link" else out)
    assert (given / "config.json").is_file()
    assert sorted(folder.name for folder in out.parent.glob(".*")) == []


def test_import_refuses_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = _checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _refused(paw, tmp_path / "there" / "out", "found 0.0 GB")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_import_failing_midway_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = _checkpoint(tmp_path)
    paw = write_checkpoint(tmp_path / "paw", config, tensors, shards=3)
    calls = 0

    def save(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        save_file(*args, **kwargs)

    monkeypatch.setattr(import_weights, "save_file", save)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CommandError
    with pytest.raises(expected):
        import_checkpoint(paw, tmp_path / "there" / "out")
    assert calls == 2
    assert _is_empty(tmp_path / "there")


def test_import_refuses_a_diverged_router(tmp_path: Path) -> None:
    config, tensors = _checkpoint(tmp_path)
    tensors[_EXTRACTOR][3, 1] = math.nan
    paw = write_checkpoint(tmp_path / "paw", config, tensors)
    with pytest.raises(RouterCheckpointError, match=r"finite numbers in layers\.1\.features\.0"):
        import_checkpoint(paw, tmp_path / "there" / "out")
    assert _is_empty(tmp_path / "there")
