"""Oracle: the generated text itself, read by rules of its own. Pins: held-out text and wording
that reach training."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from training.data import in_context, local, retrieval
from training.data.encoding import encode, render, token_counter
from training.data.families import FAMILIES, get_families
from training.data.sample import Request, Sample
from training.data.text import SPLITS, TextSource, paragraphs, read_corpus, split_documents


@pytest.fixture(scope="module")
def source(corpus: Path) -> TextSource:
    documents = split_documents(read_corpus(corpus), "train")
    return TextSource(documents, lambda texts: [len(text.split()) for text in texts])


def make(name: str, source: TextSource, seed: int = 0, tokens: int = 600, **more: Any) -> Sample:
    return FAMILIES[name].make(Request(random.Random(seed), source, tokens, **more))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_samples_depend_on_the_seed_alone(name: str, source: TextSource) -> None:
    assert make(name, source, 1) == make(name, source, 1)
    assert make(name, source, 1) != make(name, source, 2)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_samples_keep_to_their_length(name: str, source: TextSource) -> None:
    for seed in range(5):
        sample = make(name, source, seed, tokens=900)
        words = len((sample.user_text + sample.answer).split())
        assert 250 <= words <= 950, words
        assert sample.answer.strip()
        assert sample.answer_prefix == sample.answer_prefix.strip(" ")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_only_short_prompts_have_no_context(name: str, source: TextSource) -> None:
    assert (make(name, source).context == "") == FAMILIES[name].short_prompt


@pytest.mark.parametrize("name", ["needle", "multi_key", "variable_tracking"])
def test_retrieval_answers_stand_in_the_context_once(name: str, source: TextSource) -> None:
    for seed in range(20):
        sample = make(name, source, seed)
        value = sample.answer.strip(" .")
        assert value in sample.context
        if name != "variable_tracking":
            assert sample.context.count(value) == 1


def test_facts_stand_anywhere(source: TextSource) -> None:
    places = []
    for seed in range(60):
        sample = make("needle", source, seed)
        places.append(sample.context.index(sample.answer.strip(" .")) / len(sample.context))
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_variable_chains_lead_to_the_answer(source: TextSource) -> None:
    for seed in range(20):
        sample = make("variable_tracking", source, seed)
        values = dict(re.findall(r"Variable (\w+) is set to (\d+)\.", sample.context))
        links = re.findall(r"Variable (\w+) is set to the value of (\w+)", sample.context)
        for later, earlier in links:
            values[later] = values[earlier]
        assert values[sample.answer_prefix.split()[1]] == sample.answer.strip(" .")


@pytest.mark.parametrize("name", ["repeat_end", "list_end"])
def test_local_answers_stand_at_the_end(name: str, source: TextSource) -> None:
    for seed in range(20):
        sample = make(name, source, seed)
        ending = " ".join(sample.context.split()[-80:])
        assert sample.answer.strip() in ending


def test_continuations_come_from_the_same_text(source: TextSource, corpus: Path) -> None:
    whole = "\n".join(" ".join(document.text.split()) for document in read_corpus(corpus))
    for seed in range(10):
        sample = make("continue_text", source, seed)
        assert sample.context.split()[-5:] == sample.answer_prefix.split()[-5:]
        joined = " ".join((sample.answer_prefix + sample.answer).split())
        assert joined in whole


def test_code_completion_gives_the_next_lines(source: TextSource, corpus: Path) -> None:
    lines = {line for document in read_corpus(corpus) for line in document.text.split("\n")}
    sample = make("code_completion", source, 3)
    assert all(line in lines for line in sample.answer.strip("\n").split("\n"))


def test_few_shot_labels_follow_the_source(source: TextSource) -> None:
    sample = make("few_shot", source, 5)
    assert f"Label:{sample.answer}" in sample.context
    assert in_context.FAMILIES[0].group == "in_context"


def test_common_word_is_the_most_common(source: TextSource) -> None:
    for seed in range(5):
        sample = make("common_words", source, seed)
        words = sample.context.split(", ")
        assert max(set(words), key=words.count) == sample.answer.strip(" .")


def test_reasoning_answers_are_right_and_long(source: TextSource) -> None:
    sample = make("arithmetic", source, 4, tokens=3000)
    chain = (sample.answer_prefix + sample.answer).split("\n")
    for one, other in zip(chain, chain[1:], strict=False):
        assert other.startswith(one.split(" = ")[1] + " ")
        left, result = other.split(" = ")
        assert eval(left) == int(result)
    assert len(chain) > 200
    assert len(sample.user_text.split()) < 60
    tracked = make("state_tracking", source, 4, tokens=3000)
    rooms = [line.split(": ")[1] for line in tracked.answer.strip().split("\n")]
    assert rooms[:8] == [rooms[at % 4] for at in range(8)]


def test_held_out_wording_is_not_trained(source: TextSource) -> None:
    def questions(**more: bool) -> set[str]:
        return {
            re.sub(r"the \w+ \w+(?=\W)|\d+", "#", make("needle", source, seed, **more).question)
            for seed in range(80)
        }

    assert not questions() & questions(held_out_wording=True)


def test_splits_share_no_text(corpus: Path) -> None:
    documents = read_corpus(corpus)
    seen = {
        split: {
            piece
            for document in split_documents(documents, split)
            for piece in paragraphs(document)
        }
        for split in SPLITS
    }
    assert all(seen.values())
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not seen[one] & seen[other]  # type: ignore[index]


def test_a_documents_split_does_not_depend_on_the_others(corpus: Path) -> None:
    documents = read_corpus(corpus)
    assert [d.split for d in documents[:9]] == [d.split for d in read_corpus(corpus)[:9]]


@pytest.mark.parametrize("wrapper", ["chat", "plain", "instruction", "dialogue"])
def test_prompts_end_with_the_answers_prefix(
    wrapper: Any, source: TextSource, tokenizer: Any
) -> None:
    sample = make("needle", source, 1)
    assert render(sample, wrapper, tokenizer).endswith(sample.answer_prefix)
    encoded = encode(sample, wrapper, tokenizer, 4)
    count = token_counter(tokenizer)
    assert encoded.prompt_len == count([render(sample, wrapper, tokenizer)])[0]
    assert len(encoded) <= encoded.prompt_len + 4


def test_shared_tokens_hold_the_context_alone(source: TextSource, tokenizer: Any) -> None:
    for seed in range(8):
        sample = make("needle", source, seed)
        if sample.instruction_first:
            continue
        first = encode(sample, "chat", tokenizer, 4)
        second = encode(local.ask_for_last_words(sample), "chat", tokenizer, 4)
        shared = first.shared_len
        assert shared > 300
        assert (first.token_ids[:shared] == second.token_ids[:shared]).all()


def test_opened_samples_move_the_prefix_out_of_the_prompt(
    source: TextSource, tokenizer: Any
) -> None:
    sample = make("needle", source, 1)
    opened = sample.opened()
    assert opened.is_open
    assert (opened.answer_prefix, opened.answer) == (sample.answer_prefix, sample.answer)
    begun, apart = (encode(each, "chat", tokenizer, 64) for each in (sample, opened))
    assert begun.token_ids.tolist() == apart.token_ids.tolist()
    assert begun.prompt_len == apart.prompt_len + apart.prefix_len
    assert (begun.prefix_len, apart.prefix_len) == (0, len(sample.answer_prefix.split()))
    assert not render(opened, "chat", tokenizer).endswith(sample.answer_prefix)


def test_get_families_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="nothing_such"):
        get_families(("needle", "nothing_such"))
    assert {family.group for family in retrieval.FAMILIES} == {"retrieval"}
