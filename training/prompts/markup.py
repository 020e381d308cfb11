"""From mark-up to text: HTML, man pages, POD, reStructuredText, mail."""

import html
import html.parser
import re

_BLOCKS = frozenset(
    (
        *("p", "div", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl"),
        *("table", "tr", "pre", "blockquote", "dt", "dd", "title"),
    )
)
_HIDDEN = frozenset(["script", "style", "head", "nav", "footer", "noscript", "svg"])


class _Reader(html.parser.HTMLParser):
    """Collects the text of a page; white space counts in `pre` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = 0
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self.hidden += 1
        elif tag in _BLOCKS:
            self.pieces.append("\n\n" if tag not in ("tr", "dd", "dt") else "\n")
        elif tag == "li":
            self.pieces.append("\n- ")
        elif tag == "br":
            self.pieces.append("\n")
        elif tag in ("td", "th"):
            self.pieces.append(" | ")
        self.preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            self.hidden = max(0, self.hidden - 1)
        elif tag in _BLOCKS:
            self.pieces.append("\n\n" if tag not in ("tr", "dd", "dt") else "\n")
        if tag == "pre":
            self.preformatted = max(0, self.preformatted - 1)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def from_html(page: str) -> str:
    """Return the text of an HTML page."""
    body = re.search(r"<body.*", page, flags=re.S | re.I)
    reader = _Reader()
    reader.feed(body.group() if body else page)
    lines = "".join(reader.pieces).split("\n")
    return "\n".join(line.rstrip() for line in lines)


def html_title(page: str) -> str:
    """Return what stands between the title tags, or nothing."""
    found = re.search(r"<title[^>]*>(.*?)</title>", page, flags=re.S | re.I)
    return html.unescape(re.sub(r"<[^>]+>|\s+", " ", found.group(1))).strip() if found else ""


_MAN_SPECIALS = {r"\-": "-", r"\e": "\\", r"\&": "", r"\ ": " ", r"\~": " ", r"\%": "", r"\:": ""}
_MAN_NAMED = {
    "aq": "'",
    "dq": '"',
    "lq": '"',
    "rq": '"',
    "bu": "*",
    "em": "--",
    "en": "-",
    "co": "(c)",
}


def from_man(source: str) -> str:
    """Return the text of a man page written with the macros of `man`; tables are left out."""
    source = re.sub(r"^\.TS.*?^\.TE", "", source, flags=re.S | re.M)
    lines: list[str] = []
    held: list[str] = []

    def flush() -> None:
        if held:
            lines.append(" ".join(held))
            held.clear()

    literal = False
    for line in source.split("\n"):
        macro, _, rest = line.partition(" ")
        if line.startswith(('.\\"', "'\\\"", '.\\"')):
            continue
        if macro in (".SH", ".SS"):
            flush()
            lines += ["", _man_words(rest), ""]
        elif macro in (".PP", ".P", ".LP", ".IP", ".TP", ".RS", ".RE", ".br", ".sp", ".HP"):
            flush()
            lines.append("")
            if macro == ".IP" and rest:
                held.append(_man_words(rest.rsplit(" ", 1)[0] if rest[-1:].isdigit() else rest))
        elif macro in (".nf", ".EX", ".fi", ".EE"):
            flush()
            literal = macro in (".nf", ".EX")
        elif macro in (".B", ".I", ".SM", ".SB"):
            held.append(_man_words(rest))
        elif macro in (".BR", ".IR", ".RB", ".RI", ".BI", ".IB"):
            held.append(_man_words(rest, joined=True))
        elif line.startswith((".", "'")):
            continue
        elif literal:
            flush()
            lines.append(_unescape_man(line))
        else:
            held.append(_unescape_man(line))
    flush()
    return "\n".join(lines)


def _man_words(rest: str, joined: bool = False) -> str:
    words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', rest)]
    return _unescape_man(("" if joined else " ").join(words))


def _unescape_man(text: str) -> str:
    text = re.sub(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d", "", text)
    text = re.sub(r"\\\((..)|\\\[([^\]]*)\]", lambda m: _MAN_NAMED.get(m[1] or m[2], ""), text)
    for special, plain in _MAN_SPECIALS.items():
        text = text.replace(special, plain)
    return text.replace('\\"', "")


def from_pod(source: str) -> str:
    """Return the text of a Perl manual page."""
    source = re.sub(r"^=(?:cut|over|back|encoding|for|begin|end)\b.*$", "", source, flags=re.M)
    source = re.sub(r"^=item \*?", "- ", source, flags=re.M)
    source = re.sub(r"^=\w+ ?", "", source, flags=re.M)
    for _ in range(3):
        source = re.sub(r"[BCEFILSXZ]<<* ?([^<>]*?) ?>+", r"\1", source)
    return source


def from_rst(source: str) -> str:
    """Return reStructuredText without directives' heads, labels and roles."""
    source = re.sub(
        r"^\.\. (?:_|index|highlight|module|\||toctree|currentmodule).*$", "", source, flags=re.M
    )
    source = re.sub(r"^ +:[\w-]+:.*$", "", source, flags=re.M)
    source = re.sub(r":[\w:+-]+:`([^`<]*?)(?: ?<[^`>]*>)?`", r"\1", source)
    return re.sub(r"`([^`<]+?) ?<[^`>]*>`_+", r"\1", source)


def from_mail(message: str) -> str:
    """Return a mail's sender, subject and own words; addresses and signatures are left out."""
    head, _, body = message.partition("\n\n")
    sender = re.search(r"^From: \"?([^<\n\"]+)", head, flags=re.M)
    subject = re.search(r"^Subject: (.+)", head, flags=re.M)
    if not sender or not subject or "text/html" in head or "multipart" in head:
        return ""
    body = re.split(r"\n-- ?\n|\n_{20,}", body)[0]
    body = re.sub(r"\S+@\S+", "(address)", body)
    return f"From: {sender[1].strip()}\nSubject: {subject[1].strip()}\n\n{body.strip()}"
