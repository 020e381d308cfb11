"""Readers of packages' files: bytes to titled texts, one function a format."""

import gettext
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from training.prompts.markup import from_html, from_mail, from_man, from_pod, from_rst, html_title

Titled = Iterator[tuple[str, str]]
"""Title (may be empty) and text."""
Reader = Callable[[bytes, Path], Titled]


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _plain(data: bytes, path: Path) -> Titled:
    yield _stem(path), _text(data)


def _stem(path: Path) -> str:
    return re.sub(r"(\.(txt|gz|html?|en|rst|pod|md|dict|dz|zh-cn|page|info|\d))+$", "", path.name)


def _rfc(data: bytes, path: Path) -> Titled:
    """Drop the feet and heads that stand where pages turn."""
    text = re.sub(r"\n+[^\n]*\[Page \d+\]\s*\f?\s*\n?(?:RFC \d+[^\n]*\n)?", "\n\n", _text(data))
    yield _stem(path).upper().replace("RFC", "RFC "), text.replace("\f", "")


def _html(data: bytes, path: Path) -> Titled:
    page = _text(data)
    yield html_title(page) or _stem(path), from_html(page)


def _markdown(data: bytes, path: Path) -> Titled:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", _text(data))
    yield _stem(path), text


def _info(data: bytes, path: Path) -> Titled:
    """Read a compiled Texinfo manual, one text a run of nodes."""
    text = re.sub(r"\x1f\n?File: [^\n]*\n", "\n", _text(data))
    yield _stem(path), re.sub(r"\*[Nn]ote ([^:]+)::?[^.,\n]*", r"\1", text)


def _mallard(data: bytes, path: Path) -> Titled:
    page = re.sub(r"<info>.*?</info>", "", _text(data), flags=re.S)
    title = html_title(page)
    page = re.sub(r"<(/?)(?:item|steps|list|note|media|title|td)\b[^>]*>", r"<\1p>", page)
    yield title or _stem(path), from_html(page)


def _fortunes(data: bytes, path: Path) -> Titled:
    text = re.sub(r"\x1b\[\d*m", "", _text(data))
    yield _stem(path), re.sub(r"\n%%?\n", "\n\n", text).replace("\x08", "")


def _brown(data: bytes, path: Path) -> Titled:
    """Words without their tags, quotes and punctuation joined to them."""
    words = re.sub(r"(\S+)/[^\s/]+", r"\1", _text(data))
    words = re.sub(r" (``|\() ", r" \1", re.sub(r"[ \t]+", " ", words))
    words = re.sub(r" ([.,;:?!)])", r"\1", words.replace(" ''", '"').replace("``", '"'))
    paragraphs = [" ".join(piece.split()) for piece in re.split(r"\n\s*\n\s*\n", words)]
    yield _stem(path), "\n\n".join(filter(None, paragraphs))


def _tagged_zh(data: bytes, path: Path) -> Titled:
    """News of one paper: words without tags; texts of about twenty paragraphs."""
    lines = [
        re.sub(r"\[?(\S+?)/[A-Za-z]+(?:\]\w+)? *", r"\1", line) for line in _text(data).split("\n")
    ]
    full = "".join(map(chr, range(0xFF10, 0xFF1A)))
    digits = str.maketrans(full, "0123456789")
    paragraphs = [line.strip().translate(digits) for line in lines if line.strip()]
    for start in range(0, len(paragraphs), 20):
        run = paragraphs[start : start + 20]
        yield run[0][:40], "\n\n".join(run)


def _lines(data: bytes, path: Path) -> Titled:
    """Short texts, one a line; a hundred stand together."""
    lines = [line.strip() for line in _text(data).split("\n") if 20 <= len(line.strip()) <= 600]
    for start in range(0, len(lines), 100):
        yield f"{_stem(path)} {start // 100}", "\n\n".join(lines[start : start + 100])


def _mail(data: bytes, path: Path) -> Titled:
    if path.suffix == ".json":
        message = from_mail(json.loads(data)["text"].replace("\r\n", "\n"))
        if message:
            yield message.split("\n")[1].removeprefix("Subject: "), message


def _factbook(data: bytes, path: Path) -> Titled:
    country = json.loads(data)
    lines: list[str] = []
    for heading, fields in country.items():
        lines += ["", heading, ""]
        lines += [f"{name}: {_flat(value)}" for name, value in fields.items()]
    name = country.get("Government", {}).get("Country name", {})
    short = _flat(name.get("conventional short form", path.stem)) if isinstance(name, dict) else ""
    yield short or path.stem, "\n".join(lines)


def _flat(value: object) -> str:
    if isinstance(value, dict):
        inner = [
            text if key == "text" else f"{key}: {text}"
            for key, text in ((key, _flat(entry)) for key, entry in value.items())
        ]
        return "; ".join(inner)
    return re.sub(r"<[^>]+>", "", str(value))


def _endless_sky(data: bytes, path: Path) -> Titled:
    """The narration and talk of a game's missions, in their order."""
    spoken = re.findall(r"^\t+`([^`]{30,})`", _text(data), flags=re.M)
    yield path.stem, "\n\n".join(line.strip() for line in spoken)


_SPEECH = re.compile(r"(?:\[message\]|\[part\])(.*?)\[/(?:message|part)\]", re.S)


def _speeches(text: str) -> Iterator[tuple[str, str]]:
    """Speaker (empty: the narrator) and words, macros left out."""
    for block in _SPEECH.findall(text):
        words = re.search(r'(?:message|story)\s*=\s*_\s*"((?:[^"]|"")*)"', block)
        speaker = re.search(r"speaker=\s*([\w' ]+)", block)
        if words:
            name = speaker[1].strip() if speaker else ""
            yield ("" if name in ("narrator", "unit") else name), words[1].replace('""', '"')


def _wesnoth(data: bytes, path: Path) -> Titled:
    lines = [f"{name}: {words}" if name else words for name, words in _speeches(_text(data))]
    yield re.sub(r"^\d+\w?_", "", path.stem).replace("_", " "), "\n\n".join(lines)


def _wesnoth_zh(data: bytes, path: Path) -> Titled:
    """The same dialogue in the translation that lies in the package."""
    at = path.parts.index("data")
    [*catalogues] = Path(*path.parts[:at]).glob("locale/zh_CN/LC_MESSAGES/*.mo")
    if not catalogues:
        return
    with catalogues[0].open("rb") as file:
        catalogue = gettext.GNUTranslations(file)
    pairs = [(name, words, catalogue.gettext(words)) for name, words in _speeches(_text(data))]
    lines = [
        f"{catalogue.gettext(name)}：{chinese}" if name else chinese
        for name, words, chinese in pairs
        if chinese != words
    ]
    yield re.sub(r"^\d+\w?_", "", path.stem).replace("_", " "), "\n\n".join(lines)


def _rda_lines(data: bytes, path: Path) -> Titled:
    """Character vectors of an R database: books, whose lines are the vector's strings.

    Each object is its unpacked size in four bytes and a zlib stream.
    """
    while len(data) > 4:
        stream = zlib.decompressobj()
        lines = list(_r_strings(stream.decompress(data[4:])))
        data = stream.unused_data
        if len(lines) > 100:
            yield lines[0].title(), "\n".join(lines)


def _r_strings(chunk: bytes) -> Iterator[str]:
    at = chunk.find(b"\x00\x04\x00\x09")
    while at >= 0:
        size = int.from_bytes(chunk[at + 4 : at + 8], "big")
        yield chunk[at + 8 : at + 8 + size].decode("utf-8", errors="replace")
        at = chunk.find(b"\x00\x04\x00\x09", at + 8 + size)


def _code(data: bytes, path: Path) -> Titled:
    yield path.name, _text(data)


def _zip_code(data: bytes, path: Path) -> Titled:
    """Sources of Java's base libraries."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in sorted(archive.namelist()):
            if re.match(r"java\.(base|logging|net\.http|sql|prefs)/java", name) and name.endswith(
                ".java"
            ):
                yield "/".join(Path(name).parts[-4:]), _text(archive.read(name))


def _wrap(convert: Callable[[str], str]) -> Reader:
    def read(data: bytes, path: Path) -> Titled:
        yield _stem(path), convert(_text(data))

    return read


READERS: dict[str, Reader] = {
    "text": _plain,
    "rfc": _rfc,
    "html": _html,
    "markdown": _markdown,
    "texinfo": _info,
    "mallard": _mallard,
    "man": _wrap(from_man),
    "pod": _wrap(from_pod),
    "rst": _wrap(from_rst),
    "fortune": _fortunes,
    "brown": _brown,
    "tagged_zh": _tagged_zh,
    "lines": _lines,
    "mail": _mail,
    "factbook": _factbook,
    "endless_sky": _endless_sky,
    "wesnoth": _wesnoth,
    "wesnoth_zh": _wesnoth_zh,
    "rda_lines": _rda_lines,
    "code": _code,
    "zip_code": _zip_code,
}


def read_file(path: Path, format: str) -> list[tuple[str, str]]:
    """Read one file of a package.

    Args:
        path: of the file; gzip is undone.
        format: a key of READERS.

    Returns: titles and texts, not yet cleaned.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return list(READERS[format](data, path))
