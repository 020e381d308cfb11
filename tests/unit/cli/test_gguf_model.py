"""A GGUF file as a Hugging Face folder: weights, tokenizer, chat template, and what is refused.

Oracle: the tensors, tokens and words that were written into a tiny GGUF file here; for Q8_0, the
bound is half a quantum of its blocks beside bfloat16's own rounding.
"""

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flux_vllm.cli import gguf_model
from flux_vllm.cli.console import CommandError
from flux_vllm.cli.gguf_model import dequantize, license_of

pytest.importorskip("gguf")

HIDDEN, MIDDLE, HEADS, KV_HEADS, LAYERS, VOCABULARY = 64, 96, 4, 2, 2, 64
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
SHAPES = {
    "attn_norm.weight": (HIDDEN,),
    "ffn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HIDDEN, HIDDEN),
    "attn_q.bias": (HIDDEN,),
    "attn_k.weight": (KV_HEADS * 16, HIDDEN),
    "attn_k.bias": (KV_HEADS * 16,),
    "attn_v.weight": (KV_HEADS * 16, HIDDEN),
    "attn_v.bias": (KV_HEADS * 16,),
    "attn_output.weight": (HIDDEN, HIDDEN),
    "ffn_gate.weight": (MIDDLE, HIDDEN),
    "ffn_up.weight": (MIDDLE, HIDDEN),
    "ffn_down.weight": (HIDDEN, MIDDLE),
}
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def _tensors(tied: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    shapes = {f"blk.{layer}.{name}": s for layer in range(LAYERS) for name, s in SHAPES.items()}
    shapes |= {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _write_gguf(
    path: Path,
    *,
    architecture: str = "qwen2",
    tied: bool = True,
    without: str = "",
    more: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Write a tiny Qwen2 whose matrices are in Q8_0, and give its tensors in float32."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    tensors = _tensors(tied)
    tensors.pop(without, None)
    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    letters = [chr(97 + i) for i in range(26)]
    tokens = [*letters, "ab", "Ġ", ":", *(f"<t{i}>" for i in range(VOCABULARY - 30)), "<end>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (VOCABULARY - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_chat_template(TEMPLATE)
    for key, value in (more or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(key, value)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            data = quantize(tensor, GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _made(gguf: Path, folder: Path) -> Path:
    folder.mkdir()
    dequantize(gguf, folder, "Tiny-Model", lambda text: None)
    return folder


def _refused(gguf: Path, match: str) -> None:
    with pytest.raises(CommandError, match=match):
        _made(gguf, gguf.parent / "model")


def _hf_name(name: str) -> str:
    *layer, part, kind = name.split(".")
    inner = NAMES[part]
    return f"model.layers.{layer[1]}.{inner}.{kind}" if layer else f"{inner}.{kind}"


def _check_close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.bfloat16
    want = torch.from_numpy(expected)
    error = (found.float() - want).abs()
    rounding = want.abs() * 2**-8
    quantum = torch.zeros_like(want)
    if want.dim() == 2:
        blocks = want.reshape(want.shape[0], -1, 32)
        largest = blocks.abs().amax(-1, keepdim=True).expand_as(blocks).reshape(want.shape)
        quantum = largest / 127 / 2 * 1.02 + largest * 2**-8  # the scale is a float16
    assert (error <= rounding + quantum).all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_and_configuration(tied: bool, tmp_path: Path) -> None:
    tensors = _write_gguf(tmp_path / "tiny.gguf", tied=tied)
    folder = _made(tmp_path / "tiny.gguf", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == {_hf_name(name) for name in tensors}
    for name, tensor in tensors.items():
        _check_close(weights[_hf_name(name)], tensor)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["max_position_embeddings"] == 2048
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert "quantization_config" not in config
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _write_gguf(tmp_path / "tiny.gguf")
    folder = _made(tmp_path / "tiny.gguf", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "b", "content": "abc"}], tokenize=False)
    assert text == "b: abc<end>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, 28, 27, 26, 2, VOCABULARY - 1]
    assert tokenizer.model_max_length == 2048
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == VOCABULARY - 1


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "_SHARD", "40KB")
    tensors = _write_gguf(tmp_path / "tiny.gguf")
    folder = _made(tmp_path / "tiny.gguf", tmp_path / "model")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: shard.name for shard in shards for name in load_file(shard)} == index
    assert set(index) == {_hf_name(name) for name in tensors}
    assert all(shard.stat().st_size < 50_000 for shard in shards)


def test_license(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "none.gguf")
    _write_gguf(tmp_path / "mit.gguf", more={"general.license": "mit"})
    assert license_of(tmp_path / "none.gguf") == "unknown"
    assert license_of(tmp_path / "mit.gguf") == "mit"


def test_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "letter.gguf").write_bytes(b"Dear reader, this is no model at all.")
    _refused(tmp_path / "letter.gguf", "expected .*letter.gguf to be a whole GGUF file")


def test_cut_short(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    _write_gguf(whole)
    for name, size in (("header", 300), ("tensors", whole.stat().st_size - 5000), ("empty", 0)):
        (tmp_path / f"{name}.gguf").write_bytes(whole.read_bytes()[:size])
        with pytest.raises(CommandError, match=f"{name}.gguf to be a whole GGUF file"):
            dequantize(tmp_path / f"{name}.gguf", tmp_path, "Tiny", lambda text: None)


def test_one_of_several_files(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "split.gguf", more={"split.count": 3})
    _refused(tmp_path / "split.gguf", "found one of 3 files; join them")


def test_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "other.gguf", architecture="bert")
    _refused(tmp_path / "other.gguf", "a model that transformers reads from GGUF.*bert")


def test_missing_weights(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "part.gguf", without="blk.1.ffn_up.weight")
    _refused(tmp_path / "part.gguf", r"none that fit model\.layers\.1\.mlp\.up_proj\.weight")


def test_scaled_rope(tmp_path: Path) -> None:
    more = {"qwen2.rope.scaling.type": "yarn"}
    _write_gguf(tmp_path / "long.gguf", more=more)
    _refused(tmp_path / "long.gguf", "expected RoPE without scaling, found 'yarn'")


def test_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(gguf_model.shutil, "disk_usage", lambda folder: usage(90_000_000))
    _refused(tmp_path / "tiny.gguf", r"expected 0\.1\d GB free in .*, found 0\.09 GB")


def test_special_tokens_that_transformers_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.17, which takes an architecture's own end of a sequence."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained

    def read_as_5_17(folder: Path, gguf_file: str | None = None) -> Any:
        tokenizer = read(folder, gguf_file=gguf_file) if gguf_file else read(folder)
        if gguf_file:
            tokenizer.eos_token = tokenizer.pad_token = "<t0>"
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read_as_5_17)
    more = {"tokenizer.ggml.padding_token_id": 3}
    _write_gguf(tmp_path / "tiny.gguf", more=more)
    folder = _made(tmp_path / "tiny.gguf", tmp_path / "model")
    tokenizer = read(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (VOCABULARY - 1, 3)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (VOCABULARY - 1, 3)


@pytest.mark.parametrize(
    ("lost", "what"),
    [("chat_template", "chat template"), ("eos_token", "end-of-sequence token")],
)
def test_tokenizer_that_lost_something(
    lost: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had not been written as it was."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained

    def read_without(folder: Path, **gguf: str) -> Any:
        tokenizer = read(folder, **gguf)
        if not gguf:
            setattr(tokenizer, lost, None)
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read_without)
    _write_gguf(tmp_path / "tiny.gguf")
    _refused(tmp_path / "tiny.gguf", f"expected the {what} of the GGUF file")
