"""Pins: prompts that change with the order of asking, and seeds that leak between splits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flux_vllm.router.inputs import parse_inputs
from training.config import DataSettings
from training.data.batching import DenseQueries, collate, group_by_length
from training.data.encoding import Encoded
from training.data.stream import PromptStream
from training.probe import collate_probes

INPUTS = parse_inputs(["tail:16", "head:8"], [16, 32], [])


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
    micro = collate(prompts, [5, 3], INPUTS)
    for row, prompt in enumerate(prompts):
        mine = micro.answer_rows == row
        expected = prompt.token_ids[prompt.prompt_len :].tolist()
        assert micro.answer_tokens[mine].tolist() == expected
        following = micro.token_ids[row, micro.answer_positions[mine] + 1]
        assert following.tolist() == expected
        whole = micro.token_ids[row].tolist()
        assert whole == prompt.token_ids.tolist() + [0] * (len(whole) - len(prompt))
    assert micro.token_ids.shape[1] % 128 == 0
    assert (micro.indices, micro.tasks) == ([5, 3], [prompt.task for prompt in prompts])


def test_collate_shows_routers_the_prompt_without_its_answer(corpus: Path, tokenizer: Any) -> None:
    stream = PromptStream(settings(corpus), tokenizer, "train", 0)
    prompts = [stream[0], stream[1]]
    found = collate(prompts, [0, 1], INPUTS).probe
    expected = collate_probes([p.token_ids[: p.prompt_len] for p in prompts], INPUTS)
    for name in ("token_ids", "positions", "weights"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_collate_marks_the_queries_that_see_everything(corpus: Path, tokenizer: Any) -> None:
    stream = PromptStream(settings(corpus), tokenizer, "train", 0)
    prompts = [stream[0], stream[1]]
    for tail, answer in ((0, 0), (3, 0), (100_000, 0), (3, 2), (0, 2)):
        micro = collate(prompts, [0, 1], INPUTS, dense=DenseQueries(tail, answer))
        for row, prompt in zip(micro.is_tail, prompts, strict=True):
            first, last = max(0, prompt.prompt_len - tail), prompt.prompt_len + answer
            assert row.nonzero()[:, 0].tolist() == list(range(first, last))


def test_collate_can_skip_an_open_answers_prefix(corpus: Path, tokenizer: Any) -> None:
    stream = PromptStream(settings(corpus, open_fraction=1.0), tokenizer, "train", 0)
    prompt = stream[0]
    assert prompt.prefix_len > 0
    answer = prompt.token_ids[prompt.prompt_len :].tolist()
    for skip, expected in ((False, answer), (True, answer[prompt.prefix_len :])):
        micro = collate([prompt], [0], INPUTS, skip_prefix=skip)
        assert micro.answer_tokens.tolist() == expected


def test_collate_looks_at_some_answer_tokens(corpus: Path, tokenizer: Any) -> None:
    stream = PromptStream(settings(corpus, tasks=("repeat_end",)), tokenizer, "train", 0)
    prompt = stream[0]
    few = collate([prompt], [0], INPUTS, answer_tokens=2)
    assert len(few.answer_tokens) == 2
    following = few.token_ids[0, few.answer_positions + 1]
    assert following.tolist() == few.answer_tokens.tolist()
