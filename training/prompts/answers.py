"""A model's answers to a file of prompts: resumable, by vLLM where it is installed."""

import importlib.util
import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from training.prompts.answerer import Answerer, AnswerSettings, Asked
from training.prompts.jsonl import append_lines, drop_cut_line, read_lines

logger = logging.getLogger(__name__)


def write_answers(settings: AnswerSettings, answerer: Answerer | None = None) -> int:
    """Answer every line of a file that has no answer yet.

    Args:
        settings: what is answered, and how.
        answerer: one that is there already; none: made as the settings say.

    Returns: number of lines answered now.
    Raises: ValueError: a line without an id or a prompt, or two with one id.
    """
    drop_cut_line(settings.out)
    done = {row["id"] for row in read_lines(settings.out)} if settings.out.is_file() else set()
    rows = list(_unanswered(read_lines(settings.prompts), done, settings.prompts))
    if not rows:
        logger.info("all %d lines have their answers in %s", len(done), settings.out)
        return 0
    answerer = answerer or make_answerer(settings)
    started, tokens = time.monotonic(), 0
    for count, batch in _batches(rows, settings.batch):
        asked = _ask(batch, answerer, settings)
        answers = answerer.answer(asked)
        append_lines(
            settings.out,
            (
                {**row, "answer": answer.text, "answer_ids": answer.token_ids}
                for row, answer in zip(batch, answers, strict=True)
            ),
        )
        tokens += sum(len(one.token_ids) for one in asked) + sum(len(a.token_ids) for a in answers)
        seconds = time.monotonic() - started
        logger.info(
            "%d of %d answered, %.0f s, %.0f tokens/s", count, len(rows), seconds, tokens / seconds
        )
    return len(rows)


def _unanswered(
    rows: Iterable[dict[str, Any]], done: set[str], path: Path
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        name = row.get("id")
        if not name or name in seen or bool(row.get("messages")) == bool(row.get("prompt")):
            raise ValueError(
                f"{path}, line {number}: expected an `id` of its own and either `messages` or "
                f"`prompt`, found the fields {sorted(row)}, id {name!r}; complete the line"
            )
        seen.add(name)
        if name not in done:
            yield row


def _batches(rows: list[dict[str, Any]], size: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Give batches, and how many rows there are up to their ends."""
    remaining, count = iter(rows), 0
    while batch := list(itertools.islice(remaining, size)):
        count += len(batch)
        yield count, batch


def _ask(rows: list[dict[str, Any]], answerer: Answerer, settings: AnswerSettings) -> list[Asked]:
    """Render and tokenize prompts; the fast tokenizer does a batch on all cores."""
    tokenizer = answerer.tokenizer
    texts = [render(row, tokenizer) for row in rows]
    raw = [number for number, row in enumerate(rows) if not row.get("messages")]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for number in raw:
        ids[number] = tokenizer(texts[number], verbose=False)["input_ids"]
    asked = []
    for row, prompt_ids in zip(rows, ids, strict=True):
        most = settings.max_new_tokens or row.get("max_new_tokens", 128)
        kept = cut_middle(prompt_ids, answerer.max_model_len - most)
        asked.append(Asked(kept, most, settings.temperature))
    return asked


def render(row: dict[str, Any], tokenizer: Any) -> str:
    """Write a prompt as the model sees it: chats through its template, others as they are.

    Raises: ValueError: messages, and the tokenizer has no chat template.
    """
    if not row.get("messages"):
        return str(row["prompt"])
    if tokenizer.chat_template is None:
        raise ValueError(
            f"expected a tokenizer with a chat template for the messages of {row['id']}, found "
            "none; take a model tuned for chats"
        )
    return str(
        tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    )


def cut_middle(token_ids: list[int], most: int) -> list[int]:
    """Cut a prompt that is too long in its middle, so that both ends stay.

    Args:
        token_ids: of the prompt.
        most: tokens that may stay.

    Raises: ValueError: nothing may stay.
    """
    if most < 2:
        raise ValueError(
            f"expected room for a prompt beside the answer, found {most} tokens; lower "
            "--max_new_tokens"
        )
    head = most // 2
    return (
        token_ids
        if len(token_ids) <= most
        else token_ids[:head] + token_ids[len(token_ids) - (most - head) :]
    )


def make_answerer(settings: AnswerSettings) -> Answerer:
    """Load the model into vLLM or transformers, and say which.

    Raises: ValueError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if settings.engine == "vllm" and not installed:
        raise ValueError("expected vLLM for --engine vllm, found none; install it")
    if settings.engine == "transformers" or not installed:
        from training.prompts.answer_transformers import TransformersAnswerer

        logger.info("transformers answers, one prompt at a time")
        return TransformersAnswerer(settings)
    from training.prompts.answer_vllm import VllmAnswerer

    logger.info("vLLM answers")
    return VllmAnswerer(settings)
