"""Answers to a file of prompts. Oracle: transformers' own greedy generation, prompt by prompt."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config

from tests.helpers.models import give_images, write_tiny_model
from training.prompts import answers as module
from training.prompts.answer_vllm import VllmAnswerer, engine_arguments
from training.prompts.answerer import AnswerSettings
from training.prompts.answers import cut_middle, make_answerer, render, write_answers

Lines = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def model_folder(word_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [
        {"id": f"r{at}", "prompt": f"w1 w2 w{at} w7", "max_new_tokens": 5} for at in range(3, 6)
    ]
    rows.append({"id": "c", "messages": [{"role": "user", "content": "w9 w8"}], "kind": "x"})
    rows.append({"id": "long", "prompt": " ".join(f"w{at % 90}" for at in range(200))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _settings(model_folder: Path, prompts: Path, **changed: Any) -> AnswerSettings:
    settings = {
        "model": str(model_folder),
        "prompts": prompts,
        "out": prompts.with_name("answers.jsonl"),
        "engine": "transformers",
        "device": "cpu",
        "max_new_tokens": 6,
        "batch": 2,
    }
    return AnswerSettings(**(settings | changed))


def test_answers_are_the_models_own(model_folder: Path, prompts: Path, lines: Lines) -> None:
    settings = _settings(model_folder, prompts)
    assert write_answers(settings) == 5
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = make_answerer(settings).tokenizer
    rows = lines(settings.out)
    assert [row["id"] for row in rows] == ["r3", "r4", "r5", "c", "long"]
    for row in rows:
        ids = tokenizer(render(row, tokenizer), add_special_tokens=False)["input_ids"]
        ids = cut_middle(ids, 64 - 6)
        produced: list[int] = []
        while len(produced) < 6 and (not produced or produced[-1] != 1):
            with torch.inference_mode():
                logits = model(torch.tensor([ids + produced])).logits[0, -1]
            produced.append(int(logits.argmax()))
        assert row["answer_ids"] == produced
        assert row["answer"] == tokenizer.decode(produced, skip_special_tokens=True)
    assert rows[3]["kind"] == "x"
    assert "token_ids" not in rows[0]


def test_lines_say_how_long_answers_are(model_folder: Path, prompts: Path, lines: Lines) -> None:
    settings = _settings(model_folder, prompts, max_new_tokens=0, max_model_len=60)
    rows = [row for row in lines(prompts) if row["id"].startswith("r")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_answers(settings)
    assert all(1 <= len(row["answer_ids"]) <= 5 for row in lines(settings.out))


def test_a_killed_run_goes_on(
    model_folder: Path, prompts: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(model_folder, prompts)
    write_answers(settings)
    whole = settings.out.read_text()
    first, second, *_ = whole.splitlines(keepends=True)
    settings.out.write_text(first + second[:20])
    asked: list[int] = []
    make = module.make_answerer

    def counting(settings: AnswerSettings) -> Any:
        answerer = make(settings)
        answer = answerer.answer
        monkeypatch.setattr(
            answerer, "answer", lambda prompts: (asked.append(len(prompts)), answer(prompts))[1]
        )
        return answerer

    monkeypatch.setattr(module, "make_answerer", counting)
    assert write_answers(settings) == 4
    assert asked == [2, 2]
    assert settings.out.read_text() == whole
    assert write_answers(settings) == 0


def test_sampling_depends_on_the_seed(model_folder: Path, prompts: Path, lines: Lines) -> None:
    def sampled(seed: int) -> list[Any]:
        out = prompts.with_name(f"seed{seed}.jsonl")
        out.unlink(missing_ok=True)
        write_answers(_settings(model_folder, prompts, temperature=2.0, seed=seed, out=out))
        return [row["answer_ids"] for row in lines(out)]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "w1"}],
        [{"id": "a", "prompt": "w1"}, {"id": "a", "prompt": "w2"}],
        [{"id": "a"}],
        [{"id": "a", "prompt": "w1", "messages": [{"role": "user", "content": "w"}]}],
    ],
    ids=["no-id", "same-id", "no-prompt", "both"],
)
def test_incomplete_lines_are_refused(
    model_folder: Path, prompts: Path, rows: list[dict[str, Any]]
) -> None:
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="complete the line"):
        write_answers(_settings(model_folder, prompts))


def test_cut_middle_keeps_both_ends() -> None:
    assert cut_middle(list(range(10)), 10) == list(range(10))
    assert cut_middle(list(range(10)), 5) == [0, 1, 7, 8, 9]
    with pytest.raises(ValueError, match="lower --max_new_tokens"):
        cut_middle([1, 2, 3], 1)


def test_vllm_is_refused_where_it_is_missing(
    model_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="expected vLLM"):
        make_answerer(_settings(model_folder, prompts, engine="vllm"))


def test_vllm_beside_other_processes_measures_no_memory(model_folder: Path, prompts: Path) -> None:
    alone = engine_arguments(_settings(model_folder, prompts, max_model_len=512))
    assert (alone["gpu_memory_utilization"], alone["max_model_len"]) == (0.9, 512)
    assert "kv_cache_memory_bytes" not in alone
    beside = engine_arguments(_settings(model_folder, prompts, kv_gib=1.5))
    assert beside["kv_cache_memory_bytes"] == 3 * 2**29
    assert beside["gpu_memory_utilization"] < 0.1


def test_vllm_that_does_not_start_says_which_options(
    model_folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**arguments: Any) -> None:
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=fail))
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(ValueError, match=r"initialization failed.* --kv_gib and --gpu_memory"):
        VllmAnswerer(_settings(model_folder, prompts))


def test_a_model_that_takes_images_answers_as_its_text_model(
    word_tokenizer: Any,
    prompts: Path,
    lines: Lines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Not as AutoTokenizer would, which takes Qwen's words apart in their own way.
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda model: word_tokenizer)
    folder, exact = tmp_path / "model", tmp_path / "exact"
    sizes = {"heads": 4, "vocab_size": 100, "max_position_embeddings": 64}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    write_tiny_model(folder, Qwen2Config, **sizes, rope_parameters=rope)
    give_images(folder, exact)
    answers = []
    for path in (folder, exact):
        settings = _settings(path, prompts, out=path / "answers.jsonl")
        assert make_answerer(settings).max_model_len == 64
        assert write_answers(settings) == 5
        answers.append([row["answer_ids"] for row in lines(settings.out)])
    assert answers[0] == answers[1]
    assert all(answers[0])
