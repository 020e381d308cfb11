"""Invented texts of several registers and languages, a writer's answers to requests about them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training.prompts.asking import make_requests
from training.prompts.passages import Library, measure_chars_per_token
from training.prompts.texts import Text, write_texts
from training.prompts.written import Written, read_written

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
_EN_REGISTERS = (
    *("book", "essay", "novel", "story", "play", "manual", "news", "mail", "rfc", "quotes"),
    *("report", "policy", "dialogue", "man page", "help"),
)
_NAMES = ("Orlando", "Wilhelmina", "Kasimir", "Quentin", "Yolanda", "Zachary")
_TERMS = ("长河", "雪山", "风铃", "黑马")
_ZH_REGISTERS = ("book", "news", "manual", "help", "dialogue", "man page", "review")


def _english(rng: random.Random, paragraphs: int) -> str:
    ends = ("n", "rin", "sto", "lo")
    words = [f"{a}{b}{c}" for a in "bdfgklmprst" for b in "aeiou" for c in ends]

    def sentence() -> str:
        said = " ".join(rng.choices(words, k=rng.randint(6, 14))).capitalize()
        return f"{said} {rng.choice(_NAMES)}." if rng.random() < 0.1 else f"{said}."

    return "\n\n".join(
        " ".join(sentence() for _ in range(rng.randint(3, 7))) for _ in range(paragraphs)
    )


def _dialogue(rng: random.Random) -> str:
    names = ("Anna", "Bertil", "Chen")
    lines = _english(rng, 40).split("\n\n")
    return "\n\n".join(f"{rng.choice(names)}: {line}" for line in lines)


def _chinese(rng: random.Random, paragraphs: int) -> str:
    signs = [chr(code) for code in range(0x4E00, 0x4E00 + 600)]

    def sentence() -> str:
        said = "".join(rng.choices(signs, k=rng.randint(8, 24)))
        return f"{said}《{rng.choice(_TERMS)}》。" if rng.random() < 0.1 else f"{said}。"

    return "\n\n".join(
        "".join(sentence() for _ in range(rng.randint(3, 6))) for _ in range(paragraphs)
    )


def _code(rng: random.Random) -> str:
    lines = []
    for number in range(60):
        name = f"f{rng.randrange(10**6)}"
        lines += [f"def {name}(value):", f"    total = value * {number}"]
        lines += [f"    return total + {name}_x", ""]
    return "\n".join(lines)


@pytest.fixture(scope="session")
def texts() -> list[Text]:
    """Make a hundred documents."""
    rng = random.Random(3)
    made = []
    for number in range(4):
        for register in _EN_REGISTERS:
            words = _dialogue(rng) if register in ("dialogue", "play") else _english(rng, 120)
            source, title = f"{register} of {number % 2}", f"{register} {number}"
            made.append(Text(register, source, title, "en", words))
        for register in _ZH_REGISTERS:
            title = f"{'pos' if number % 2 else 'neg'} {number}"
            made.append(Text(register, f"中{register}", title, "zh", _chinese(rng, 100)))
        for package in ("alpha", "beta"):
            made.append(Text("code", package, f"{package}/m{number}.py", "py", _code(rng)))
    return made


@pytest.fixture(scope="session")
def texts_file(texts: list[Text], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl.gz"
    write_texts(path, texts)
    return path


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """One token a word or Chinese character, all unknown ones the same; with a chat template."""
    tokens = ["[UNK]", "[END]", *(f"w{number}" for number in range(98))]
    made = Tokenizer(models.WordLevel({token: at for at, token in enumerate(tokens)}, "[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", eos_token="[END]", pad_token="[END]"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def library(texts: list[Text], word_tokenizer: Any) -> Library:
    def count(pieces: list[str]) -> list[int]:
        return [len(ids) for ids in word_tokenizer(pieces)["input_ids"]]

    return Library(texts, measure_chars_per_token(texts, count))


def answered(row: dict[str, Any], library: Library) -> dict[str, Any]:
    """Answer a writer's request as a model would, with words of its passage."""
    rng = random.Random(row["id"])
    about = row["about"]
    reference = about["passages"][0]
    text = library.texts[reference["text"]]
    words = text.text[reference["start"] : reference["end"]]
    chinese = about["language"] == "zh"
    parts = [words[at : at + 4] for at in range(0, 400, 4)] if chinese else words.split()
    parts = rng.sample([part for part in parts if part.isalnum()], 20)
    joint = "" if chinese else " "
    question, answer = ("问题：", "答案：") if chinese else ("Question: ", "Answer: ")
    kind = row["kind"]
    if kind in ("question", "two_facts"):
        asked = joint.join(["什么是" if chinese else "What is done to", *parts[:4]])
        said = f"{question}{asked}{'？' if chinese else '?'}\n{answer}{parts[5]}"
    elif kind in ("dialogue", "short_dialogue"):
        names = ("小王", "李明") if chinese else ("Tom", "Ruth")
        said = "\n".join(f"{names[at % 2]}: {joint.join(parts[at : at + 6])}" for at in range(12))
        if kind == "short_dialogue":
            said += f"\n\n{'摘要：' if chinese else 'Summary: '}{joint.join(parts[:10])}"
    else:
        said = joint.join(parts)
        said = said[:250] if kind == "instruction" else said
    return {**row, "answer": said, "answer_ids": [1]}


@pytest.fixture(scope="session")
def written_rows(library: Library) -> list[dict[str, Any]]:
    return [answered(row, library) for row in make_requests(library, 900, seed=1)]


@pytest.fixture(scope="session")
def written(written_rows: list[dict[str, Any]], library: Library) -> Written:
    return read_written(written_rows, library)


@pytest.fixture
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """Give a reader of JSON lines."""

    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return read
