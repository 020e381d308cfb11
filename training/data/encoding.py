"""From samples to token ids: chat wrappers, tokenizer, prompt and answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from training.data.sample import Sample

Wrapper = Literal["chat", "plain", "instruction", "dialogue"]
WRAPPERS: tuple[Wrapper, ...] = ("chat", "plain", "instruction", "dialogue")
"""`chat` is the model's own template; the others are text around the user's turn."""

_PATTERNS: dict[Wrapper, str] = {
    "plain": "{user}\n\n",
    "instruction": "### Instruction:\n{user}\n\n### Response:\n",
    "dialogue": "User: {user}\nAssistant: ",
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as token ids."""

    task: str
    token_ids: np.ndarray
    """[T] int32: prompt, answer's prefix where open, answer. NumPy, since worker processes hand it
    over by value."""
    prompt_len: int
    shared_len: int
    """Leading tokens that hold the context and not the question; 0 where the question leads."""
    prefix_len: int = 0
    """Tokens of the answer's prefix after the prompt; 0 where the prompt ends with it."""

    def __len__(self) -> int:
        return len(self.token_ids)


def token_counter(tokenizer: Any) -> Callable[[list[str]], list[int]]:
    """Return a function that counts the tokens of each of a list of texts."""

    def count(texts: list[str]) -> list[int]:
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [len(row) for row in ids]

    return count


def render(sample: Sample, wrapper: Wrapper, tokenizer: Any) -> str:
    """Write the prompt as the server sees it: with the answer's prefix unless it is open.

    Raises: ValueError: wrapper `chat`, and the tokenizer has no chat template.
    """
    begun = "" if sample.is_open else sample.answer_prefix
    if wrapper != "chat":
        return _PATTERNS[wrapper].format(user=sample.user_text) + begun
    if tokenizer.chat_template is None:
        raise ValueError(
            "expected a tokenizer with a chat template for the wrapper 'chat', found none; use "
            f"--data.wrappers with {[name for name in WRAPPERS if name != 'chat']}"
        )
    turns = [{"role": "user", "content": sample.user_text}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return str(text) + begun


def encode(sample: Sample, wrapper: Wrapper, tokenizer: Any, max_answer_tokens: int) -> Encoded:
    """Tokenize one sample.

    Args:
        sample: of a family or a file.
        wrapper: what stands around the user's turn.
        tokenizer: the model's, from transformers.
        max_answer_tokens: the answer is cut to this many, not counting its prefix.

    Returns: Encoded.
    """
    text = render(sample, wrapper, tokenizer)
    at = text.find(sample.context) if sample.context and not sample.instruction_first else -1
    prefix = sample.answer_prefix if sample.is_open else ""
    texts = [text, prefix, sample.answer, text[: at + len(sample.context)] if at >= 0 else ""]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return Encoded(
        task=sample.task,
        token_ids=np.array(ids[0] + ids[1] + ids[2][:max_answer_tokens], dtype=np.int32),
        prompt_len=len(ids[0]),
        shared_len=max(0, len(ids[3]) - 1),
        prefix_len=len(ids[1]),
    )
