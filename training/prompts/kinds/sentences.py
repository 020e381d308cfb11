"""Sentences, names and openings of running text, and slips put into it."""

import random
import re

_TITLES = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Ms", "Dr", "St", "No", "vs"))
_ENDS = {
    "en": re.compile(rf"(?:(?<=[.!?])|(?<=[.!?][\"”')])){_TITLES}(?<!\b[A-Z]\.)\s+(?=[\"“A-Z])"),
    "zh": re.compile(r"(?<=[。！？])(?![”’」』）])"),
}
_NAME = {
    "en": re.compile(r"(?<=[a-z,;] )(?!M(?:rs?|iss)\b|Dr\b)[A-Z][a-z]{2,}(?: [A-Z][a-z]+)?\b"),
    "zh": re.compile(r"(?<=[《“「])[\u4e00-\u9fff]{2,12}(?=[》”」])|[A-Z][A-Za-z]{2,}"),
}
_CHINESE = re.compile(r"[\u4e00-\u9fff，、：；“”《》]")
_PAIRS = {"“": "”", "「": "」", "《": "》", "(": ")", "（": "）", "[": "]"}
_LENGTHS = {"en": (50, 260), "zh": (12, 110)}


def squeezed(text: str) -> str:
    """Put one space for every run of spaces and line breaks."""
    return " ".join(text.split())


def sentences_of(text: str, language: str) -> list[str]:
    """List the whole sentences of prose, in their order, each on one line.

    Headings, rows of numbers, menus and very short or long sentences are left out.
    """
    return [sentence for sentence in _split(text, language) if _is_whole(sentence, language)]


def _split(text: str, language: str) -> list[str]:
    """Cut every paragraph at the ends of its sentences."""
    return [
        sentence.strip()
        for paragraph in text.split("\n\n")
        for sentence in _ENDS[language].split(squeezed(paragraph))
    ]


def _is_whole(sentence: str, language: str) -> bool:
    low, high = _LENGTHS[language]
    ends = sentence.rstrip("\"”’」')").endswith((".", "!", "?", "。", "！", "？"))
    return ends and low <= len(sentence) <= high and is_prose(sentence, language)


def unique_sentences(text: str, language: str) -> list[str]:
    """List the sentences whose opening words stand in the text only once."""
    joined = squeezed(text)
    return [
        sentence
        for sentence in sentences_of(text, language)
        if joined.count(opening(sentence, language)) == 1 and sentence in joined
    ]


def opening(words: str, language: str) -> str:
    """Give the first six words of a text, or its first nine Chinese characters."""
    joined = squeezed(words)
    return joined[:9].strip() if language == "zh" else " ".join(joined.split(" ")[:6])


def names_of(text: str, language: str) -> list[str]:
    """List names and quoted terms that stand within sentences.

    Words that verses begin with are no names: the text has them in small letters too.
    """
    sentences = sentences_of(text, language)
    names = {name for sentence in sentences for name in _NAME[language].findall(sentence)}
    small = {word for word in re.findall(r"\w+", text) if word.islower()}
    return sorted(name for name in names if name.split()[0].lower() not in small)


def mentions(text: str, name: str, language: str) -> list[str]:
    """List the sentences that hold a name, in their order.

    Returns: none where the name is also part of other words, or is first or last mentioned outside
        whole sentences.
    """
    whole = re.compile(rf"\b{re.escape(name)}\b" if language == "en" else re.escape(name))
    if len(whole.findall(text)) != text.count(name):
        return []
    holding = [sentence for sentence in _split(text, language) if whole.search(sentence)]
    fit = holding and all(_is_whole(sentence, language) for sentence in (holding[0], holding[-1]))
    return holding if fit else []


def misspell(rng: random.Random, words: str, language: str, slips: int) -> str:
    """Put slips of the hand into a text: letters swapped or dropped, words doubled or missing.

    Args:
        rng: source of chance.
        words: on one line.
        language: of the words; Chinese has characters in place of words.
        slips: how many; fewer where the text is short.

    Returns: the text with slips.
    """
    units = list(words) if language == "zh" else words.split(" ")
    # Slips at ends of sentences could not be told from other punctuation.
    fit = re.compile(r"[\u4e00-\u9fff]" if language == "zh" else r"[A-Za-z]{5,}")
    long_enough = [at for at, unit in enumerate(units) if fit.fullmatch(unit)]
    for at in rng.sample(long_enough, min(slips, len(long_enough))):
        units[at] = _slip(rng, units[at], language)
    return "".join(units) if language == "zh" else squeezed(" ".join(units))


def _slip(rng: random.Random, unit: str, language: str) -> str:
    choice = rng.random()
    if language == "zh":
        return unit * 2 if choice < 0.5 else ""
    place = rng.randrange(1, len(unit) - 2)
    if choice < 0.4:
        return unit[:place] + unit[place + 1] + unit[place] + unit[place + 2 :]
    if choice < 0.75:
        return unit[:place] + unit[place + 1 :]
    return f"{unit} {unit}" if choice < 0.9 else ""


def is_prose(words: str, language: str) -> bool:
    """Tell running words from rows of numbers, commands, menus and cut quotes."""
    joined = squeezed(words)
    if joined.count('"') % 2 or any(joined.count(a) != joined.count(b) for a, b in _PAIRS.items()):
        return False
    if language == "zh":
        return len(_CHINESE.findall(joined)) > 0.7 * len(joined)
    letters = sum(char.isalpha() or char == " " for char in joined)
    return letters > 0.88 * len(joined) and joined.lstrip('"“')[:1].isupper() and " " in joined
