"""A library of texts from which passages and runs of text are drawn."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.prompts.texts import Text

_PASSAGE_CHARS = {"en": (500, 2600), "zh": (220, 1000)}
_REGISTER_WEIGHTS = {
    **dict.fromkeys(("news", "essay", "report"), 1.6),
    **dict.fromkeys(("novel", "story", "book", "dialogue"), 1.2),
    **dict.fromkeys(("quotes", "poetry", "review", "faq"), 0.4),
    **dict.fromkeys(("dictionary", "play", "man page"), 0.7),
}
"""How often registers are drawn against the others; what is asked about most, more often."""
_CHINESE = re.compile(r"[\u3000-\u9fff\uff00-\uffef]")


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of one text, cut between paragraphs."""

    text_index: int
    start: int
    end: int
    """Characters of the text."""


class Library:
    """Texts grouped by what can be drawn from them.

    Args:
        texts: all documents.
        chars_per_token: of a text's language; `measure_chars_per_token` gives it.
    """

    def __init__(self, texts: Sequence[Text], chars_per_token: dict[str, float]) -> None:
        self.texts = list(texts)
        self._chars_per_token = chars_per_token
        self._groups: dict[str, list[int]] = {}
        for index, text in enumerate(self.texts):
            kind = "code" if text.is_code else "zh" if text.is_chinese else "en"
            for name in (kind, f"{kind}/{text.register}", f"source/{text.source}"):
                self._groups.setdefault(name, []).append(index)
        self._weights = {
            name: _running_weights([self.texts[index] for index in indices], name)
            for name, indices in self._groups.items()
        }

    def groups(self, prefix: str) -> list[str]:
        """Name the groups that begin so: `en/news`, `source/django`, ..."""
        return sorted(name for name in self._groups if name.startswith(prefix))

    def indices(self, group: str) -> list[int]:
        """List the texts of a group."""
        return self._groups.get(group, [])

    def draw_index(self, rng: random.Random, group: str) -> int:
        """Draw a text of a group: registers and works in about equal parts, not by their size."""
        indices = self._groups[group]
        return rng.choices(indices, cum_weights=self._weights[group])[0]

    def chars(self, text: Text, tokens: int) -> int:
        """Estimate how many characters of a text make up so many tokens."""
        return int(tokens * self._chars_per_token[ratio_key(text)])

    def passage(self, rng: random.Random, group: str) -> Passage:
        """Draw a passage of 500 to 2,600 characters (Chinese: 220 to 1,000)."""
        for _ in range(200):
            index = self.draw_index(rng, group)
            text = self.texts[index]
            low, high = _PASSAGE_CHARS["zh" if text.is_chinese else "en"]
            start, end = self._cut(rng, text.text, rng.randint((2 * low + high) // 3, high))
            if end - start >= low and _is_worth_asking(text, start, end):
                return Passage(index, start, end)
        raise ValueError(
            f"expected passages of {low} characters and more in {group}, found none in 200 texts; "
            "add longer texts"
        )

    def run(self, rng: random.Random, index: int, tokens: int) -> str:
        """Cut a run of about so many tokens out of a text, the whole text if it is shorter."""
        text = self.texts[index]
        start, end = self._cut(rng, text.text, self.chars(text, tokens))
        return text.text[start:end].strip("\n")

    def around(self, rng: random.Random, passage: Passage, tokens: int) -> str:
        """Cut a run that holds the passage at a random place."""
        text = self.texts[passage.text_index]
        spare = max(0, self.chars(text, tokens) - (passage.end - passage.start))
        before = int(spare * rng.random())
        start = _paragraph_edge(text.text, max(0, passage.start - before), 0, passage.start)
        end_near = min(len(text.text), passage.end + spare - (passage.start - start))
        end = _paragraph_edge(text.text, end_near, passage.end, len(text.text))
        return text.text[start:end].strip("\n")

    def words(self, passage: Passage) -> str:
        """Return a passage's text."""
        return self.texts[passage.text_index].text[passage.start : passage.end].strip("\n")

    @staticmethod
    def _cut(rng: random.Random, text: str, chars: int) -> tuple[int, int]:
        if len(text) <= chars:
            return 0, len(text)
        near = rng.randrange(0, len(text) - chars + 1)
        start = _paragraph_edge(text, near, 0, len(text))
        end = _paragraph_edge(text, min(len(text), start + chars), start + chars // 2, len(text))
        return start, max(end, start + 1)


def _paragraph_edge(text: str, near: int, low: int, high: int) -> int:
    """Find the beginning of a paragraph, or of a line, or of a sentence, next to a place.

    Returns: a place from `low` to `high`.
    """
    for mark, reach in (("\n\n", 1500), ("\n", 800), (". ", 400), ("。", 200)):
        before = text.rfind(mark, max(low, near - reach), near)
        after = text.find(mark, near, min(high, near + reach))
        places = [place + len(mark) for place in (before, after) if place >= 0]
        places = [place for place in places if low <= place <= high]
        if places:
            return min(places, key=lambda place: abs(place - near))
    return min(max(near, low), high)


def _running_weights(texts: list[Text], group: str) -> list[float]:
    """Weigh texts: registers by `_REGISTER_WEIGHTS`, their works by the root of their size."""
    registers: dict[str, dict[str, int]] = {}
    for text in texts:
        works = registers.setdefault(_part(text, group), {})
        works[text.source] = works.get(text.source, 0) + len(text.text)
    running, total = [], 0.0
    for text in texts:
        works = registers[_part(text, group)]
        share = works[text.source] ** 0.5 / sum(size**0.5 for size in works.values())
        weight = _REGISTER_WEIGHTS.get(text.register, 1.0)
        total += weight * share * len(text.text) / works[text.source]
        running.append(total)
    return running


def _part(text: Text, group: str) -> str:
    """Name the register where a group holds several."""
    return "" if "/" in group else text.register


def _is_worth_asking(text: Text, start: int, end: int) -> bool:
    """Tell prose from contents pages, rules and numbers."""
    words = text.text[start:end]
    if text.is_chinese:
        return len(_CHINESE.findall(words)) > 0.5 * len(words)
    if text.is_code:
        return True
    lines = words.split("\n")
    short = sum(len(line) < 25 for line in lines if line)
    letters = sum(map(str.isalpha, words))
    return letters > 0.68 * len(words) and short < 0.6 * len(lines)


def ratio_key(text: Text) -> str:
    """Name the group of texts whose characters a token are about alike."""
    return text.source if text.is_code or text.is_chinese else text.register


def measure_chars_per_token(
    texts: Sequence[Text], count_tokens: Callable[[list[str]], list[int]]
) -> dict[str, float]:
    """Measure characters a token on samples of each group.

    Args:
        texts: all documents.
        count_tokens: number of tokens of each of a list of texts.
    """
    samples: dict[str, list[str]] = {}
    for text in texts:
        pieces = samples.setdefault(ratio_key(text), [])
        if len(pieces) < 20:
            middle = len(text.text) // 2
            pieces.append(text.text[max(0, middle - 1500) : middle + 1500])
    return {
        key: max(0.5, sum(map(len, pieces)) / max(1, sum(count_tokens(pieces))))
        for key, pieces in samples.items()
    }
