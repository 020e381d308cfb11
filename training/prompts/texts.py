"""Texts of many registers out of packages: collected, cleaned, bounded, written, read back."""

import dataclasses
import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from training.prompts.fetch import Fetcher, Package
from training.prompts.readers import read_file

_SOURCES = Path(__file__).with_name("sources.json")
_SMALLEST_CHARS = {"en": 600, "zh": 250}
_LARGEST_CHARS = 200_000
_SHORT_REGISTERS = {"mail": 200, "dialogue": 300}
"""Registers whose texts are short by nature, and their smallest size in characters."""
_UNUSUAL = re.compile(
    r"[^\n -~\u00a0-\u024f\u0370-\u04ff\u2010-\u2044\u2100-\u22ff\u3000-\u30ff\u4e00-\u9fff"
    r"\uff00-\uffee]"
)
"""What is neither Latin, Greek, Cyrillic, Chinese, kana nor common punctuation."""


@dataclass(frozen=True, slots=True)
class Text:
    """One document."""

    register: str
    """Kind of writing: manual, book, news, code, ..."""
    source: str
    """The work or package it is part of."""
    title: str
    language: str
    """`en`, `zh`; for code the language of the file's suffix, `py`, `java`, ..."""
    text: str

    @property
    def is_code(self) -> bool:
        """Whether it is source code."""
        return self.register == "code"

    @property
    def is_chinese(self) -> bool:
        """Whether it is Chinese prose."""
        return self.language == "zh"


def read_packages(path: Path = _SOURCES) -> list[Package]:
    """Read the list of packages."""
    return [Package(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def collect_texts(
    packages: Iterable[Package], fetcher: Fetcher, workers: int = 2
) -> tuple[list[Text], list[dict[str, Any]]]:
    """Fetch packages and read their texts; the same text is kept once.

    Args:
        packages: to read, in the order that decides which of two equal texts is kept.
        fetcher: gets and unpacks them.
        workers: processes that read.

    Returns: the texts; a row a package of name, archive, register, texts and characters.
    Raises: OSError: a package cannot be had. ValueError: a package has no text where it should.
    """
    listed = list(packages)
    folders = [fetcher.unpacked(package) for package in listed]
    with ProcessPoolExecutor(workers) as pool:
        found = list(pool.map(read_package, listed, folders))
    seen: set[bytes] = set()
    kept: list[Text] = []
    rows: list[dict[str, Any]] = []
    for package, texts in zip(listed, found, strict=True):
        fresh = list(_unseen(texts, seen))
        kept += fresh
        rows.append(
            {
                "manager": package.manager,
                "package": package.name,
                "archive": fetcher.version(package),
                "register": package.register,
                "language": package.language,
                "texts": len(fresh),
                "characters": sum(len(text.text) for text in fresh),
            }
        )
    return kept, rows


def _unseen(texts: Iterable[Text], seen: set[bytes]) -> Iterator[Text]:
    """Drop equal texts, and those that begin as an earlier one: versions of a page."""
    for text in texts:
        squeezed = "".join(text.text.split())
        middle = len(squeezed) // 2
        marks = {
            hashlib.sha256(part.encode()).digest()
            for part in (squeezed[200:800], squeezed[middle : middle + 400])
        }
        if not marks & seen:
            yield text
        seen |= marks


def read_package(package: Package, folder: Path) -> list[Text]:
    """Read one unpacked package up to its limit.

    Files are taken in an order that hashes of their names fix, so that a limit cuts no part of
    the alphabet off.

    Raises: ValueError: there is no text.
    """
    files = {path for pattern in package.files for path in folder.glob(pattern) if path.is_file()}
    names = {path: str(path.relative_to(folder)) for path in files}
    texts: list[Text] = []
    left = package.limit_mib * 2**20
    for path in sorted(files, key=lambda path: hashlib.sha256(names[path].encode()).digest()):
        if left <= 0:
            break
        if any(part in f"/{names[path]}" for part in package.skip) or path.is_symlink():
            continue
        for title, raw in read_file(path, package.format):
            if package.format == "code":
                title = "/".join(path.relative_to(folder).parts[-4:])
            for text in _make(package, title, raw, path):
                if left > 0:
                    texts.append(text)
                    left -= len(text.text.encode())
    if not texts:
        raise ValueError(
            f"expected text of {package.name} in {package.files} below {folder}, found none; "
            "correct its entry in sources.json"
        )
    return texts


def _make(package: Package, title: str, raw: str, path: Path) -> Iterator[Text]:
    cleaned = clean_text(raw, package.register == "code")
    smallest = _SHORT_REGISTERS.get(package.register, _SMALLEST_CHARS[package.language])
    language = package.language
    if package.register == "code":
        language = (Path(title).suffix or path.suffix).lstrip(".")
    for number, part in enumerate(_parts(cleaned)):
        if len(part) >= smallest and _is_readable(part, package):
            name = f"{title}, part {number + 1}" if len(cleaned) > len(part) else title
            yield Text(package.register, package.title or package.name, name, language, part)


def _parts(text: str) -> Iterator[str]:
    """Cut a long text between paragraphs."""
    while len(text) > _LARGEST_CHARS:
        cut = text.rfind("\n\n", 0, _LARGEST_CHARS)
        cut = cut if cut > 0 else _LARGEST_CHARS
        yield text[:cut]
        text = text[cut:].lstrip("\n")
    yield text


def _is_readable(text: str, package: Package) -> bool:
    """Tell text from tables of numbers, and Chinese from pages that nobody translated."""
    if package.register == "code":
        longest = max(map(len, text.split("\n")))
        return longest < 600
    if package.language == "zh":
        return len(re.findall(r"[\u4e00-\u9fff]", text)) > 0.25 * len(text)
    letters = sum(map(str.isalpha, text))
    return letters > 0.5 * len(text) and text.count(" ") > 0.08 * len(text)


def clean_text(text: str, code: bool = False) -> str:
    """Drop control characters, trailing space, long rules; keep words and line breaks."""
    text = text.replace("\t", "    ") if not code else text.expandtabs(4)
    text = _UNUSUAL.sub("", text)
    text = re.sub(r"[ \u00a0]+\n", "\n", text.replace("\u00a0", " "))
    if not code:
        text = re.sub(r"([-=*_#.~^+])\1{5,}", r"\1\1\1", text)
        text = re.sub(r"(?<=\S)[ \u3000]{3,}(?=\S)", "  ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def write_texts(path: Path, texts: Iterable[Text]) -> None:
    """Write texts as JSON lines; `.xz` and `.gz` compress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open(path, "wt") as file:
        for text in texts:
            file.write(json.dumps(dataclasses.asdict(text), ensure_ascii=False) + "\n")


def read_texts(path: Path) -> list[Text]:
    """Read what `write_texts` wrote."""
    with _open(path, "rt") as file:
        return [Text(**json.loads(line)) for line in file]


def _open(path: Path, mode: str) -> TextIO:
    if path.suffix == ".xz":
        # A fast preset: the file is a tenth larger, and made in a quarter of the time.
        preset = 3 if "w" in mode else None
        return lzma.open(path, mode, preset=preset, encoding="utf-8")  # type: ignore[return-value]
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode, encoding="utf-8")  # type: ignore[operator, return-value, no-any-return]
