"""Prompts written to a file and read back; oracle: those that an evaluation makes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.training.conftest import make_model
from training.config import DataSettings, EvalConfig
from training.evaluation import prompts as module
from training.evaluation.prompts import PromptSetting, make_prompts, read_prompts, write_prompts


@pytest.fixture
def config(
    tokenizer: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> EvalConfig:
    monkeypatch.setattr(module, "load_tokenizer", lambda model: tokenizer)
    limit = make_model().config.max_position_embeddings
    monkeypatch.setattr(module, "model_limit", lambda model: limit)
    return EvalConfig(
        model="tiny",
        router="",
        out=str(tmp_path),
        data=DataSettings(tasks=("needle", "repeat_end"), corpus=str(corpus), workers=0),
        lengths=(256, 320),
        prompts=2,
        variant_prompts=3,
    )


def _assert_same(read: list[Any], made: list[Any]) -> None:
    assert len(read) == len(made)
    for one, other in zip(read, made, strict=True):
        found, expected = dataclasses.asdict(one), dataclasses.asdict(other)
        np.testing.assert_array_equal(found.pop("token_ids"), expected.pop("token_ids"))
        assert found == expected


def test_written_prompts_read_back_as_evaluated(config: EvalConfig, tokenizer: Any) -> None:
    path = write_prompts(config)
    read, before = read_prompts(path)
    setting = PromptSetting(split="test", seed=1, lengths=(256, 320), prompts=2)
    made = make_prompts(config.data, tokenizer, setting, 2048)
    _assert_same(read.prompts, made.prompts)
    assert (read.lengths, before) == (made.lengths, [])
    assert all(prompt.prefix_len > 0 for prompt in read.prompts)
    assert not (path.parent / "cached.jsonl").exists()
    first, last = (json.loads(path.read_text().splitlines()[at]) for at in (0, -1))
    assert (first["group"], first["metric"]) == ("retrieval", "exact")
    assert (last["group"], last["metric"]) == ("local", "tokens")


def test_cached_prompts_share_their_context(config: EvalConfig) -> None:
    path = write_prompts(dataclasses.replace(config, variants=("cached",)))
    asked, before = read_prompts(path.with_name("cached.jsonl"))
    assert len(asked.prompts) == len(before) == 2 * 3
    for question, earlier in zip(asked.prompts, before, strict=True):
        assert question.task == "needle"
        shared = question.shared_len
        assert 16 < shared < question.prompt_len
        np.testing.assert_array_equal(question.token_ids[:shared], earlier.token_ids[:shared])
        assert question.token_ids.tolist() != earlier.token_ids.tolist()


def test_tasks_without_a_context_share_none(config: EvalConfig, tokenizer: Any) -> None:
    mixed = dataclasses.replace(config.data, tasks=("needle", "arithmetic", "few_shot"))
    setting = PromptSetting(split="test", seed=1, lengths=(512,), prompts=2, same_context=True)
    made = make_prompts(mixed, tokenizer, setting, 2048)
    assert [prompt.task for prompt in made.prompts] == ["needle"] * 2 + ["few_shot"] * 2
    assert made.lengths == [512] * 4
    assert all(prompt.shared_len > 16 for prompt in made.prompts)
    alone = dataclasses.replace(config.data, tasks=("arithmetic",))
    with pytest.raises(ValueError, match=r"with a context, found \['arithmetic'\]"):
        make_prompts(alone, tokenizer, setting, 2048)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found 0 of which 0 have it"),
        ('{"task": "needle", "length": 256}', "line 1: .* without .*'token_ids'"),
    ],
    ids=["empty", "fields"],
)
def test_read_prompts_refuses_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
