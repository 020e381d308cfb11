"""Small pieces of the library that structured material is made of: titles, sentences, names."""

import datetime
import re
from collections.abc import Iterator

from training.prompts.kinds.drawing import Draw
from training.prompts.kinds.sentences import sentences_of, squeezed
from training.prompts.texts import Text
from training.prompts.wordings_file import phrases

PROSE = {
    "en": ("book", "essay", "novel", "story", "manual", "news", "mail", "report", "policy", "help"),
    "zh": ("book", "news", "manual", "help", "review"),
}
_TITLED = {"en": ("manual", "book", "mail", "help", "report"), "zh": ("help", "news", "manual")}
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_ODD = re.compile(r"[|●@<>{}\[\]_=\\*#^~“”\"「」]|[ -]{3}")
_REPLY = re.compile(r"^(?:(?:re|fwd?|aw)\s*:\s*|\[[^\]]*\]\s*)+", re.I)
_NUMBERED = re.compile(
    r"^(?:(?:Chapter|Appendix|第|附录) ?)?(?:\d|[A-Z]\.)[.\d]*(?: ?[章节])?\.? +(?=\S)"
)
_PART = re.compile(r", part \d+$")
_IDENTIFIER = re.compile(r"\b[a-z]{2,12}_[a-z][a-z_]{1,18}[a-z]\b")
_PACKED = re.compile(r"^(?:cache/)?(?:pypi-)?")


def _group(draw: Draw, registers: tuple[str, ...]) -> str:
    """Name one of the registers that the library has in the drawn language."""
    there = [f"{draw.language}/{register}" for register in registers]
    return draw.rng.choice([group for group in there if draw.library.indices(group)])


def sentence(draw: Draw, high: int = 150, registers: tuple[str, ...] = ()) -> str:
    """Draw a sentence of at most so many characters; of a third of them where it is Chinese."""
    high = high // 3 if draw.language == "zh" else high
    for _ in range(60):
        index = draw.library.draw_index(draw.rng, _group(draw, registers or PROSE[draw.language]))
        text = draw.library.texts[index].text
        at = draw.rng.randrange(max(1, len(text) - 1200))
        # The first and the last may be cut.
        found = sentences_of(text[at : at + 1200], draw.language)[1:-1]
        found = [words for words in found if len(words) <= high]
        if found:
            return draw.rng.choice(found)
    return squeezed(text[at:])[:high]


def titled(draw: Draw, high: int = 44, registers: tuple[str, ...] = ()) -> tuple[str, int] | None:
    """Draw a telling title and its text's index; None where a few texts have none."""
    high = high if draw.language == "en" else high // 2
    for _ in range(6):
        group = _group(draw, registers or _TITLED[draw.language])
        # All pages alike: works of few pages would give the same titles again and again.
        index = draw.rng.choice(draw.library.indices(group))
        found = _REPLY.sub("", squeezed(draw.library.texts[index].title))
        found = _PART.sub("", _NUMBERED.sub("", found))
        found = re.split(r": | — | \(", found)[0].strip(" .,。")
        if _is_telling(found, draw.language) and len(found) <= high:
            return found, index
    return None


def title(draw: Draw, high: int = 44) -> str:
    """Draw a title, or the beginning of a sentence."""
    found = titled(draw, high) if draw.rng.random() < 0.75 else None
    if found:
        return found[0]
    words = sentence(draw)
    if draw.language == "zh":
        return re.split(r"[，。；：、！？ ]", _NUMBERED.sub("", words))[0][: high // 2]
    return " ".join(words.split()[: draw.rng.randint(3, 6)]).rstrip(",;:.!?")


def _is_telling(words: str, language: str) -> bool:
    if _ODD.search(words) or re.search(r"[/`（]", words):
        return False
    if language == "zh":
        return len(_CHINESE.findall(words)) >= 3
    return words.count(" ") >= 1 and sum(map(str.isalpha, words)) >= 8


def people(draw: Draw) -> Iterator[str]:
    """Draw people, never one twice; some have three names."""
    first, last = phrases("first_names", draw.language), phrases("last_names", draw.language)
    more = (
        "ABCDEFGHJKLMNPRSTW"
        if draw.language == "en"
        else [name for name in first if len(name) == 1]
    )
    drawn: set[str] = set()
    while True:
        own, family = draw.rng.choice(first), draw.rng.choice(last)
        middle = draw.rng.choice(more) if draw.rng.random() < 0.3 else ""
        middle = "" if draw.language == "zh" and (len(own) > 1 or own == middle) else middle
        if draw.language == "en":
            name = f"{own} {middle}. {family}" if middle else f"{own} {family}"
        else:
            name = family + own + middle
        if name not in drawn:
            drawn.add(name)
            yield name


def identifiers(draw: Draw) -> Iterator[str]:
    """Draw names of variables and functions from code, or of usual words; never one twice."""
    plain = phrases("key_words", "en")
    drawn: set[str] = set()
    while True:
        text = draw.library.texts[draw.library.draw_index(draw.rng, "code")].text
        found = sorted(set(_IDENTIFIER.findall(text)) - drawn)
        batch = draw.rng.sample(found, min(len(found), 10))
        batch += ["_".join(draw.rng.sample(plain, draw.rng.randint(2, 3))) for _ in range(2)]
        for name in batch:
            if name not in drawn:
                drawn.add(name)
                yield name


def code_title(text: Text) -> str:
    """Give the path of a file of code as inside its repository."""
    return _PART.sub("", _PACKED.sub("", text.title))


def code_path(draw: Draw) -> str:
    """Draw the path of a file of code."""
    index = draw.library.draw_index(draw.rng, "code")
    return code_title(draw.library.texts[index])


def day(draw: Draw, first_year: int = 2019, last_year: int = 2026) -> datetime.date:
    """Draw a day."""
    start = datetime.date(first_year, 1, 1)
    days = (datetime.date(last_year, 12, 31) - start).days
    return start + datetime.timedelta(days=draw.rng.randrange(days))


def date_style(draw: Draw) -> str:
    """Draw a way to write days, for `strftime`."""
    styles = {
        "en": ("%Y-%m-%d", "%d %B %Y", "%B %d, %Y", "%d/%m/%Y", "%a %d %b %Y"),
        "zh": ("%Y-%m-%d", "%Y年%m月%d日", "%Y/%m/%d", "%Y.%m.%d"),
    }
    return draw.rng.choice(styles[draw.language])
