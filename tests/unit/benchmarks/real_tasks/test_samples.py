"""Samples read, wrapped and cut, and the families they come in.

Oracle: a tokenizer of whole words, whose tokens can be counted by eye.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_tasks.metrics import NEEDLE_TASKS
from benchmarks.real_tasks.needles import PHRASES, VALUES, make_needles
from benchmarks.real_tasks.samples import Encoder, Sample, digest, read_samples
from benchmarks.real_tasks.tasks import TaskOptions, load


class WordTokenizer:
    """A token a word; BOS is 0."""

    def __init__(self) -> None:
        self.words: list[str] = ["<s>"]
        self.options: dict[str, Any] = {}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        ids = [self.words.index(word) for word in text.split()]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " " + " ".join(self.words[token] for token in ids)

    def apply_chat_template(
        self,
        turns: list[dict[str, Any]],
        tokenize: bool,
        add_generation_prompt: bool,
        **options: Any,
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        self.options = options
        return " ".join(f"<{turn['role']}> {turn['content']}" for turn in turns) + " <assistant>"

    def text(self, ids: list[int]) -> str:
        return " ".join(self.words[token] for token in ids)


def _sample(prompt: str = "", **fields: Any) -> Sample:
    return Sample(**({"task": "qasper", "id": "1", "prompt": prompt, "max_new_tokens": 4} | fields))


def test_encode_wraps_the_users_turn() -> None:
    tokenizer = WordTokenizer()
    asked = Encoder(tokenizer, 100, {"enable_thinking": False}).encode(_sample("what is it"))
    assert tokenizer.text(asked.token_ids) == "<user> what is it <assistant>"
    assert tokenizer.options == {"enable_thinking": False}
    assert asked.cut_tokens == 0


def test_encode_leaves_other_prompts_as_they_are() -> None:
    tokenizer = WordTokenizer()
    asked = Encoder(tokenizer, 100).encode(_sample("def f():", chat=False))
    assert tokenizer.text(asked.token_ids) == "<s> def f():"


def test_encode_cuts_the_middle_of_the_longest_turn() -> None:
    tokenizer = WordTokenizer()
    turns = (
        {"role": "user", "content": "short one"},
        {"role": "assistant", "content": " ".join(f"w{at}" for at in range(20))},
        {"role": "user", "content": "and now"},
    )
    # 24 words and 4 marks are to fit 20 tokens: the long turn keeps 12 words.
    asked = Encoder(tokenizer, 24).encode(_sample(messages=turns))
    expected = [*range(6), *range(14, 20)]
    assert tokenizer.text(asked.token_ids) == (
        f"<user> short one <assistant> {' '.join(f'w{at}' for at in expected)} "
        "<user> and now <assistant>"
    )
    assert asked.cut_tokens == 8


def test_encode_refuses_what_cannot_fit() -> None:
    with pytest.raises(ValueError, match="expected a prompt and 4 new tokens to fit 6 tokens"):
        Encoder(WordTokenizer(), 6).encode(_sample("a b c d e f"))


def test_digest_tells_prompts_and_lengths_apart() -> None:
    encoder = Encoder(WordTokenizer(), 100)
    one, other = encoder.encode(_sample("a")), encoder.encode(_sample("b"))
    longer = encoder.encode(_sample("a", max_new_tokens=5))
    assert len({digest([one]), digest([other]), digest([longer]), digest([one, other])}) == 4
    assert digest([one]) == digest([encoder.encode(_sample("a", id="2"))])


def test_read_samples_fills_in_what_a_file_of_prompts_leaves_out(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    lines = [{"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "go on", "chat": False}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_samples(file, new_tokens=64)
    assert (first.task, first.id, first.chat, first.answers) == ("mine", "mine-1", True, ())
    assert (second.prompt, second.chat, second.max_new_tokens) == ("go on", False, 64)
    with pytest.raises(ValueError, match="mine.jsonl:1: expected `prompt` or `messages`"):
        read_samples(file)  # how long an answer may be is not said


def test_needles_hide_what_they_ask_for() -> None:
    samples = make_needles(40, 3000, 28000)
    assert samples == make_needles(40, 3000, 28000)
    assert samples != make_needles(40, 3000, 28000, seed=1)
    assert {sample.task for sample in samples} == set(NEEDLE_TASKS)
    assert len(VALUES) + len(PHRASES) >= 12
    for sample in samples:
        assert len(sample.answers) == (3 if sample.task == "hidden_values" else 1)
        for answer in sample.answers:
            assert sample.prompt.count(answer) == 1
    lengths = [len(sample.prompt) for sample in samples]
    assert lengths[0] == pytest.approx(3000 * 4.4, rel=0.01)
    assert lengths[-1] == pytest.approx(28000 * 4.4, rel=0.01)
    depths = [
        sample.prompt.index(sample.answers[0]) / len(sample.prompt)
        for sample in samples
        if len(sample.answers) == 1
    ]
    assert min(depths) < 0.15
    assert max(depths) > 0.8


def _options(folder: Path, **fields: Any) -> TaskOptions:
    lines = [
        {"task": task, "id": f"{task}-{at}", "prompt": f"{task} {at}", "answers": [str(at)],
         "max_new_tokens": 8, "chat": True}
        for task in ("qasper", "lcc") for at in range(3)
    ]  # fmt: skip
    (folder / "longbench_dev.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    lines = [line | {"task": "gsm8k"} for line in lines]
    (folder / "gsm8k_dev.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return TaskOptions(folder=folder, **fields)


def test_load_limits_each_task(tmp_path: Path) -> None:
    samples = load("longbench", _options(tmp_path, limit=2))
    assert [sample.id for sample in samples] == ["qasper-0", "qasper-1", "lcc-0", "lcc-1"]


def test_load_asks_for_steps_and_for_chains_of_thought(tmp_path: Path) -> None:
    options = _options(tmp_path, chains=2, chain_new_tokens=(2000, 2560))
    gsm8k = load("gsm8k", options)
    assert len(gsm8k) == 6
    assert gsm8k[0].prompt.startswith("qasper 0\n\nThink step by step.")
    chains = load("chains", options)
    assert [chain.answers for chain in chains] == [("1",), ("2",)]
    assert {(chain.min_new_tokens, chain.max_new_tokens) for chain in chains} == {(2000, 2560)}
    assert {chain.task for chain in chains} == {"chain_of_thought"}


def test_load_asks_for_one_problem_of_a_list(tmp_path: Path) -> None:
    listed = load("gsm8k_list", _options(tmp_path))
    assert len(listed) == 6
    assert listed == load("gsm8k_list", _options(tmp_path))
    for one in listed:
        number = re.search(r"Solve problem (\d+) of this list", one.prompt)
        assert number is not None
        own = one.id.removeprefix("gsm8k_list-").replace("-", " ")
        assert f"Problem {number[1]}. {own}\n" in one.prompt
        assert f'which begins "{own}", and' in one.prompt
        assert all(
            one.prompt.count(f". {task} {at}\n") == 1
            for task in ("qasper", "lcc")
            for at in range(3)
        )
        assert one.score(f"So it is {one.answers[0]}.") == 1
    assert len({one.prompt.split("Solve")[0] for one in listed}) > 1


def test_load_refuses_what_is_not_there(tmp_path: Path) -> None:
    options = _options(tmp_path)
    with pytest.raises(ValueError, match="expected --prompts FILE"):
        load("prompts", options)
    with pytest.raises(ValueError, match="expected a task family among"):
        load("squad", options)
