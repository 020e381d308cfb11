"""A long real text with a code word planted in it, made from what every Python brings along."""

from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

CODE_WORD = "TANGERINE"
CODE_WORD_SENTENCE = f"The secret code word of the vault is {CODE_WORD}."
CODE_WORD_QUESTION = "What is the secret code word of the vault?"

TOKENS = 3100
PLANTED_AFTER = 0.45
"""Share of the text before the code word: out of reach of the first and of the latest tokens."""

# Chapters of Python's own manual, as `help()` shows them.
_CHAPTERS = ("typesseq", "typesmapping", "typesseq-mutable")


def text_with_code_word(model: Path) -> tuple[str, int, int]:
    """Make the text.

    Args:
        model: folder of the model, for its tokenizer.

    Returns: the text, its length in tokens, and the tokens before the code word.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    paragraphs = "\n".join(topics[chapter] for chapter in _CHAPTERS).split("\n\n")
    lengths = [len(encoded.ids) for encoded in tokenizer.encode_batch(paragraphs)]
    ends = list(accumulate(length + 1 for length in lengths))  # one token for each blank line
    before = bisect_left(ends, PLANTED_AFTER * TOKENS)
    end = bisect_left(ends, TOKENS)
    head, tail = "\n\n".join(paragraphs[:before]), "\n\n".join(paragraphs[before:end])
    text = f"{head}\n\n{CODE_WORD_SENTENCE}\n\n{tail}"
    return text, len(tokenizer.encode(text).ids), len(tokenizer.encode(head).ids)
