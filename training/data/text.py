"""Real text found offline: collected into documents, split by document, cut into paragraphs.

Splits are by document, so no held-out paragraph is ever seen in training; a document's split
depends on its content alone, not on what else was collected.
"""

import gzip
import hashlib
import html.parser
import json
import lzma
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

Split = Literal["train", "validation", "test"]
Kind = Literal["prose", "code"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_SUFFIXES = (".pod", ".rst", ".rst.txt", ".txt", ".md", ".html", ".py")
_LICENCES = Path("/usr/share/common-licenses")
_PERL = Path("/usr/share/perl")
_SMALLEST_CHARS = 2000
_PARAGRAPH_CHARS = (160, 1200)
_CODE_LINES = 16


@dataclass(frozen=True, slots=True)
class Document:
    """One text."""

    source: str
    """Where it came from; information, and the label of few-shot classification."""
    kind: Kind
    text: str

    @property
    def digest(self) -> str:
        """Content hash, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def split(self) -> Split:
        """80% train, 10% validation, 10% test."""
        bucket = int(self.digest[:8], 16) % 10
        return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def default_sources() -> list[Path]:
    """List the folders with long text that any machine with Python has."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return [folder for folder in (stdlib, _LICENCES, _PERL) if folder.is_dir()]


def collect(folders: Iterable[Path], limit_mib: float = 8.0) -> list[Document]:
    """Read long text files below the folders, duplicates dropped.

    Args:
        folders: where to look for .pod, .rst, .txt, .md, .html and .py files (also .gz).
        limit_mib: of text from each folder, files being taken in an order that their names'
            hashes fix.

    Returns: the documents.
    Raises: FileNotFoundError: nothing was found.
    """
    documents: dict[str, Document] = {}
    for folder in folders:
        total = 0
        for path in sorted(folder.rglob("*"), key=lambda found: _order(found, folder)):
            name = path.name.removesuffix(".gz")
            licence = folder == _LICENCES
            if not path.is_file() or not (licence or name.endswith(_SUFFIXES)):
                continue
            if {"test", "tests", "site-packages"} & set(path.parts):
                continue
            text = clean(_read(path), Path(name).suffix)
            if len(text) < _SMALLEST_CHARS or total > limit_mib * 2**20:
                continue
            kind: Kind = "code" if name.endswith(".py") else "prose"
            if kind == "prose" and not _reads_as_prose(text):
                continue
            document = Document(source=_source_name(path, folder), kind=kind, text=text)
            if document.digest not in documents:
                documents[document.digest] = document
                total += len(text)
    if not documents:
        raise FileNotFoundError(
            f"expected text files (.pod, .rst, .txt, .md, .html, .py) below "
            f"{[str(folder) for folder in folders]}, found none; give folders that hold some"
        )
    return list(documents.values())


def _order(path: Path, folder: Path) -> str:
    return hashlib.sha256(str(path.relative_to(folder)).encode()).hexdigest()


def _read(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace")


def _reads_as_prose(text: str) -> bool:
    """Tell prose from tables of numbers and symbols."""
    return sum(map(str.isalpha, text)) > 0.65 * len(text)


def _source_name(path: Path, folder: Path) -> str:
    if path.name.endswith(".pod"):
        return "perl manual"
    if path.name.endswith(".py"):
        return "python code"
    return folder.name if folder == _LICENCES else path.parent.name


class _TagStripper(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style", "head")
        if tag in ("p", "li", "div", "h1", "h2", "h3", "pre", "tr"):
            self.pieces.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data)


def clean(text: str, suffix: str) -> str:
    """Drop mark-up and control characters; keep the words and line breaks."""
    if suffix == ".html":
        stripper = _TagStripper()
        stripper.feed(text)
        text = "".join(stripper.pieces)
    if suffix == ".pod":
        text = re.sub(r"^=\w+ ?", "", text, flags=re.M)
        text = re.sub(r"[BCEFILSXZ]<+ ?([^<>]*?) ?>+", r"\1", text)
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    text = re.sub(r"[^\n\x20-\x7e\u00a0-\u024f\u2010-\u2027]", "", text)
    text = re.sub(r"([-=*_#.~^])\1{5,}", r"\1\1\1", text)
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def write_corpus(path: Path, documents: Iterable[Document]) -> None:
    """Write documents as JSON lines; `.xz` and `.gz` compress."""
    with _open(path, "wt") as file:
        for document in documents:
            row = {"source": document.source, "kind": document.kind, "text": document.text}
            file.write(json.dumps(row) + "\n")


def read_corpus(path: Path) -> list[Document]:
    """Read what `write_corpus` wrote."""
    with _open(path, "rt") as file:
        return [Document(**json.loads(line)) for line in file]


def _open(path: Path, mode: str) -> TextIO:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    return opener(path, mode, encoding="utf-8")  # type: ignore[no-any-return, operator]


def paragraphs(document: Document) -> Iterator[str]:
    """Cut a document into pieces of 160 to 1,200 characters, code at every 16 lines."""
    if document.kind == "code":
        lines = [line for line in document.text.split("\n") if line.strip()]
        for start in range(0, len(lines) - _CODE_LINES, _CODE_LINES):
            yield "\n".join(lines[start : start + _CODE_LINES])
        return
    short, long = _PARAGRAPH_CHARS
    held = ""
    for piece in document.text.split("\n\n"):
        held = f"{held}\n{piece}" if held else piece
        while len(held) > long:
            cut = max(held.rfind(end, short, long) for end in (". ", ".\n", "\n", " "))
            cut = long if cut < 0 else cut + 1
            yield held[:cut].strip()
            held = held[cut:].lstrip()
        if len(held) >= short:
            yield held.strip()
            held = ""


@dataclass(frozen=True, slots=True)
class _Cut:
    source: str
    kind: Kind
    pieces: list[str]
    tokens: list[int]


class TextSource:
    """Paragraphs of one split, to be drawn in their order from a random place.

    Args:
        documents: of the split.
        count_tokens: number of tokens of each of a list of texts.
    """

    def __init__(
        self, documents: Sequence[Document], count_tokens: Callable[[list[str]], list[int]]
    ) -> None:
        self._cuts: dict[Kind, list[_Cut]] = {"prose": [], "code": []}
        for document in documents:
            pieces = list(paragraphs(document))
            if len(pieces) >= 3:
                tokens = [count + 2 for count in count_tokens(pieces)]
                cut = _Cut(document.source, document.kind, pieces, tokens)
                self._cuts[document.kind].append(cut)
        if not self._cuts["prose"]:
            raise ValueError("expected documents of prose in the split, found none; add text")

    def run(self, rng: random.Random, tokens: int, kind: Kind = "prose") -> list[str]:
        """Draw paragraphs that stand together, of at most `tokens` tokens in all but at least one.

        Documents are chosen by length, and others follow where one ends.
        """
        cuts = self._cuts[kind] or self._cuts["prose"]
        found: list[str] = []
        left = tokens
        while left > 0:
            cut = rng.choices(cuts, weights=[len(cut.pieces) for cut in cuts])[0]
            for at in range(rng.randrange(len(cut.pieces)), len(cut.pieces)):
                left -= cut.tokens[at]
                if left < 0 and found:
                    break
                found.append(cut.pieces[at])
        return found

    def snippet(self, rng: random.Random, source: str) -> str:
        """Draw one paragraph of a named source."""
        cuts = [cut for kind in self._cuts.values() for cut in kind if cut.source == source]
        return rng.choice(rng.choice(cuts).pieces)

    def sources(self, least_pieces: int = 40) -> list[str]:
        """Name the sources with enough paragraphs to draw from."""
        counts: dict[str, int] = {}
        for cut in (cut for kind in self._cuts.values() for cut in kind):
            counts[cut.source] = counts.get(cut.source, 0) + len(cut.pieces)
        return sorted(source for source, count in counts.items() if count >= least_pieces)


def split_documents(documents: Iterable[Document], split: Split) -> list[Document]:
    """Keep the documents of one split."""
    return [document for document in documents if document.split == split]
