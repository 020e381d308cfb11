"""Pins: prompts that change with the order of asking, and seeds that leak between splits."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from training.config import DataSettings
from training.data.batching import collate, fixed_chunk_ends, group_by_length, random_chunk_ends
from training.data.encoding import Encoded
from training.data.stream import PromptStream


def settings(corpus: Path, **more: Any) -> DataSettings:
    arguments = {
        "tasks": ("needle", "repeat_end"),
        "corpus": str(corpus),
        "min_tokens": 256,
        "max_tokens": 512,
        "workers": 0,
    }
    return DataSettings(**arguments | more)


def key(prompt: Encoded) -> bytes:
    return prompt.token_ids.tobytes()


def test_prompts_depend_on_the_index_alone(corpus: Path, tokenizer: Any) -> None:
    one = PromptStream(settings(corpus), tokenizer, "train", 0)
    other = PromptStream(settings(corpus), tokenizer, "train", 0)
    forward = [key(one[index]) for index in range(6)]
    assert [key(other[index]) for index in reversed(range(6))] == forward[::-1]


def test_splits_and_seeds_give_other_prompts(corpus: Path, tokenizer: Any) -> None:
    seen = [
        {key(PromptStream(settings(corpus), tokenizer, split, seed)[index]) for index in range(6)}
        for split, seed in (("train", 0), ("train", 1), ("validation", 0), ("test", 0))
    ]
    assert len(set.union(*seen)) == 24


def test_the_mix_is_balanced_by_turns(corpus: Path, tokenizer: Any) -> None:
    stream = PromptStream(settings(corpus), tokenizer, "train", 0)
    for turn in range(5):
        assert {stream[2 * turn].task, stream[2 * turn + 1].task} == {"needle", "repeat_end"}


def test_an_unbalanced_mix_is_warned_of(corpus: Path, tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="needle 5"):
        PromptStream(settings(corpus, weights=(5.0, 1.0)), tokenizer, "train", 0)


def test_prompts_of_a_step_are_of_one_length(corpus: Path, tokenizer: Any) -> None:
    stream = PromptStream(settings(corpus), tokenizer, "train", 0, same_length=8)
    lengths = [len(stream[index]) for index in range(16)]
    assert max(lengths[:8]) - min(lengths[:8]) < 160


def test_prompts_stay_below_the_models_limit(corpus: Path, tokenizer: Any) -> None:
    stream = PromptStream(settings(corpus), tokenizer, "train", 0, max_model_tokens=300)
    assert max(len(stream[index]) for index in range(10)) <= 300


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files_of_both_kinds_are_read(suffix: str, tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"task": "mine", "prompt": f"q {at} {at * 7} {at * at}", "answer": f"answer {at}"}
        for at in range(40)
    ]
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    own = DataSettings(tasks=(), files=(str(path),), workers=0)
    streams = {s: PromptStream(own, tokenizer, s, 0) for s in ("train", "validation")}  # type: ignore[arg-type]
    seen = {s: {key(stream[at]) for at in range(60)} for s, stream in streams.items()}
    assert not seen["train"] & seen["validation"]
    assert streams["train"][0].task == "mine"


def test_rows_of_messages_are_read(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        for at in range(20):
            turns = [
                {"role": "user", "content": f"q {at}"},
                {"role": "assistant", "content": "a b"},
            ]
            file.write(json.dumps({"task": "t", "messages": turns}) + "\n")
    own = DataSettings(tasks=(), files=(str(path),), workers=0)
    prompt = PromptStream(own, tokenizer, "train", 0)[0]
    assert len(prompt) - prompt.prompt_len == 2


def test_incomplete_rows_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"task": "t", "prompt": "p"}')
    with pytest.raises(ValueError, match=r"data\.jsonl, row 1"):
        PromptStream(DataSettings(tasks=(), files=(str(path),)), tokenizer, "train", 0)


def test_group_by_length_keeps_to_the_budget() -> None:
    lengths = [100, 900, 300, 120, 5000, 80]
    groups = list(group_by_length(lengths, 2048))
    assert sorted(sum(groups, [])) == list(range(6))
    for group in groups:
        width = -(-max(lengths[index] for index in group) // 128) * 128
        assert len(group) == 1 or len(group) * width <= 2048


def test_collate_points_at_the_answers(corpus: Path, tokenizer: Any) -> None:
    stream = PromptStream(settings(corpus), tokenizer, "train", 0)
    prompts = [stream[0], stream[1]]
    micro = collate(prompts, [0, 1], [[p.prompt_len] for p in prompts], 16)
    for row, prompt in enumerate(prompts):
        mine = micro.answer_rows == row
        expected = prompt.token_ids[prompt.prompt_len :].tolist()
        assert micro.answer_tokens[mine].tolist() == expected
        following = micro.token_ids[row, micro.answer_positions[mine] + 1]
        assert following.tolist() == expected


def test_collate_looks_at_some_answer_tokens(corpus: Path, tokenizer: Any) -> None:
    stream = PromptStream(settings(corpus, tasks=("repeat_end",)), tokenizer, "train", 0)
    prompt = stream[0]
    few = collate([prompt], [0], [[prompt.prompt_len]], 16, answer_tokens=2)
    assert len(few.answer_tokens) == 2
    following = few.token_ids[0, few.answer_positions + 1]
    assert following.tolist() == few.answer_tokens.tolist()


def test_chunk_ends_end_with_the_prompt() -> None:
    assert fixed_chunk_ends(1000, 512) == [512, 1000]
    assert fixed_chunk_ends(1024, 512) == [512, 1024]
    assert fixed_chunk_ends(1000, None) == [1000]
    rng = random.Random(0)
    counts = set()
    for _ in range(200):
        ends = random_chunk_ends(700, rng, 0.5, 3)
        assert ends[-1] == 700
        assert sorted(set(ends)) == ends
        counts.add(len(ends))
    assert counts == {1, 2, 3}
