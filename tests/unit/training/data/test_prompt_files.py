"""Prompts from files. Oracle: the files' own words, put together and cut by hand."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.conftest import VOCABULARY, WordTokenizer
from training.config import DataSettings
from training.data.prompt_files import FilePrompts, encode_prompt, prompt_ids, read_prompt_files

BEGIN = 0
PIECES = {5: "wo", 6: " r", 7: "ds\ufffd"}


class BeginningTokenizer(WordTokenizer):
    """Puts a token of its own before a text, unless told not to, as Llama's does."""

    def __call__(self, texts: str | list[str], **options: object) -> dict[str, list[Any]]:
        ids = super().__call__(texts)["input_ids"]
        if options.get("add_special_tokens", True):
            assert isinstance(texts, str)
            ids = [BEGIN, *ids]
        return {"input_ids": ids}

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(PIECES[at] for at in ids)


TOKENIZER = BeginningTokenizer()


def words(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def many(count: int = 60, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"ask {at} {at * 7}", "answer": f"say {at}"} | more for at in range(count)]


def open_split(file: str, split: Any = "train", seed: int = 0, **more: Any) -> FilePrompts:
    return FilePrompts(DataSettings(files=(file,), **more), TOKENIZER, split, seed, 4096)


def asked(prompts: FilePrompts, count: int | None = None) -> list[tuple[int, ...]]:
    return [tuple(prompts[at].token_ids) for at in range(count or len(prompts))]


def test_splits_share_no_prompt_and_lose_none(tmp_path: Path) -> None:
    file = write(tmp_path / "all.jsonl", *many(100))
    splits = [set(asked(open_split(file, split))) for split in ("train", "validation", "test")]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 100
    assert len(splits[0]) > 60
    assert all(splits)


def test_a_prompts_split_depends_on_what_is_asked_alone(tmp_path: Path) -> None:
    rows = many(40)
    reordered = [row | {"answer": "other", "task": "t"} for row in reversed(rows)]
    files = [write(tmp_path / f"{at}.jsonl", *some) for at, some in enumerate((rows, reordered))]
    texts = [{prompt.prompt for prompt in open_split(file, "test").prompts} for file in files]
    assert texts[0] == texts[1]


def test_the_order_is_the_seeds_and_the_passs(tmp_path: Path) -> None:
    file = write(tmp_path / "all.jsonl", *many())
    prompts = open_split(file)
    size = len(prompts)
    once = asked(prompts, 3 * size)
    assert asked(open_split(file), 3 * size) == once
    passes = [once[start : start + size] for start in range(0, 3 * size, size)]
    assert len({frozenset(one) for one in passes}) == 1
    assert len(set(passes[0])) == size
    assert len({tuple(one) for one in passes}) == 3
    assert asked(open_split(file, seed=1)) != once[:size]
    # Any place can be asked for at once: a resumed run sees what it would have seen.
    assert tuple(open_split(file)[2 * size + 5].token_ids) == passes[2][5]


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what now"},
    ]
    text = "[system]\nbe brief\n[user]\nwhat now\n[assistant]\n"
    file = write(tmp_path / "chat.jsonl", {"messages": turns, "answer": "go on then"})
    found = encode_prompt(*read_prompt_files([Path(file)]), TOKENIZER, 100, 64)
    # The template writes its own special tokens: none is put before it.
    assert found.token_ids.tolist() == [*words(text), *words("go on then")]
    assert (found.prompt_len, found.prefix_len, found.task) == (len(words(text)), 0, "prompt")


def test_an_assistants_last_turn_is_the_answer(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello you"}]
    bare = write(tmp_path / "bare.jsonl", {"messages": turns})
    # With an answer of its own, it is part of what is asked.
    more = write(tmp_path / "more.jsonl", {"messages": turns, "answer": "so long"})
    first, second = (read_prompt_files([Path(file)])[0] for file in (bare, more))
    assert (list(first.messages), first.answer) == (turns[:1], "hello you")
    assert (list(second.messages), second.answer) == (turns, "so long")


def test_a_plain_prompt_is_taken_as_a_server_takes_it(tmp_path: Path) -> None:
    file = write(tmp_path / "plain.jsonl", {"prompt": "once upon", "answer": "a time", "task": "t"})
    found = encode_prompt(*read_prompt_files([Path(file)]), TOKENIZER, 100, 64)
    assert found.token_ids.tolist() == [BEGIN, *words("once upon"), *words("a time")]
    assert (found.prompt_len, found.task) == (3, "t")


def test_answer_ids_are_preferred_to_text(tmp_path: Path) -> None:
    row = {"prompt": "ask", "answer": "words", "answer_ids": [5, 6, 7]}
    file = write(tmp_path / "ids.jsonl", row)
    found = encode_prompt(*read_prompt_files([Path(file)]), TOKENIZER, 100, 2)
    assert found.token_ids.tolist() == [BEGIN, *words("ask"), 5, 6]  # and cut


@pytest.mark.parametrize(
    ("text", "ids"),
    [("other", [5, 6]), ("words", [5, 6, VOCABULARY]), ("", [5, VOCABULARY])],
    ids=["text", "vocabulary", "ids alone"],
)
def test_answers_of_another_model_are_refused(text: str, ids: list[int], tmp_path: Path) -> None:
    file = write(tmp_path / "ids.jsonl", {"prompt": "ask", "answer": text, "answer_ids": ids})
    with pytest.raises(
        ValueError, match="expected answer_ids of this model's tokenizer, which say"
    ):
        encode_prompt(*read_prompt_files([Path(file)]), TOKENIZER, 100, 2)


@pytest.mark.parametrize("limit", [7, 8])
def test_a_long_prompt_loses_its_middle(limit: int) -> None:
    text = " ".join(f"w{at}" for at in range(30))
    whole = [BEGIN, *words(text)]
    assert prompt_ids((), text, TOKENIZER, 31) == whole
    head = limit // 2
    expected = whole[:head] + whole[-(limit - head) :]
    assert prompt_ids((), text, TOKENIZER, limit) == expected


def test_prompt_and_answer_stay_within_the_models_limit(tmp_path: Path) -> None:
    row = {"prompt": "long " * 600, "answer": "say " * 40}
    settings = DataSettings(
        files=(write(tmp_path / "long.jsonl", *[row] * 3),),
        min_tokens=256,
        max_tokens=300,
        max_answer_tokens=16,
    )
    split = next(iter(read_prompt_files([tmp_path / "long.jsonl"]))).split
    for limit, total in ((4096, 316), (280, 280)):
        (first, *rest) = FilePrompts(settings, TOKENIZER, split, 0, limit).sample(9)
        assert len(first) == total
        assert len(first) - first.prompt_len == 16
        assert len(rest) == 2


def test_tasks_are_those_of_the_files(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "some.jsonl", *many(30, task="b")),
        write(tmp_path / "more.jsonl", *many(30, task="a"), *many(30)),
    ]
    prompts = FilePrompts(DataSettings(files=tuple(files)), TOKENIZER, "train", 0, 4096)
    assert prompts.task_names == ["a", "b", "prompt"]
    assert {prompts[at].task for at in range(len(prompts))} == {"a", "b", "prompt"}


def test_a_sample_is_spread_over_the_files(tmp_path: Path) -> None:
    prompts = open_split(write(tmp_path / "all.jsonl", *many(100)))
    few = [prompt.token_ids.tolist() for prompt in prompts.sample(3)]
    last = len(prompts) - 1
    chosen = [prompts.prompts[at] for at in (0, round(last / 2), last)]
    assert few == [[BEGIN, *words(row.prompt), *words(row.answer)] for row in chosen]
    assert len(prompts.sample(10**6)) == len(prompts)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ask"},
        {"answer": "say"},
        {"prompt": "ask", "messages": [{"role": "user", "content": "ask"}], "answer": "say"},
        {"messages": [{"role": "user", "content": "ask"}], "answer": ""},
    ],
    ids=["no-answer", "nothing-asked", "both", "empty"],
)
def test_incomplete_lines_are_named(row: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in (many(1)[0], row)))
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: expected `messages` or `prompt`"):
        read_prompt_files([file])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "hello"},
        {"messages": [{"role": "user"}]},
        {"messages": ["hello"]},
        {"prompt": "a", "answer_ids": "12"},
    ],
    ids=["text", "no content", "no object", "ids"],
)
def test_lines_of_other_types_are_named(row: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "types.jsonl", {"prompt": "a", "answer": "b"}, {"answer": "b"} | row)
    with pytest.raises(
        ValueError, match=r"types\.jsonl, line 2: expected `messages` .*, found .* and .*; correct"
    ):
        read_prompt_files([Path(file)])


@pytest.mark.parametrize("line", ["{broken", "[1, 2]"])
def test_lines_that_are_no_json_object_are_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(many(1)[0]) + f"\n\n{line}\n")
    expected = rf"data\.jsonl, line 3: expected a JSON object, found '{re.escape(line)}'; write"
    with pytest.raises(ValueError, match=expected):
        read_prompt_files([file])


def test_a_split_without_prompts_is_refused(tmp_path: Path) -> None:
    row = many(1)[0]
    file = write(tmp_path / "one.jsonl", row)
    other = "test" if read_prompt_files([Path(file)])[0].split == "train" else "train"
    with pytest.raises(ValueError, match=rf"{other} split.*one\.jsonl.*give more prompts"):
        open_split(file, other)
