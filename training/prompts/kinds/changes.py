"""Kinds on changes of code: a series of them, and the last one."""

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice

from training.prompts.kinds.drawing import Draw, Kind, Made, fill
from training.prompts.kinds.entries import Ask, asked, asked_last, at_most_one, grow
from training.prompts.kinds.pieces import code_title, date_style, day, identifiers, people
from training.prompts.wordings_file import phrases

_NAME = re.compile(r"\b(?=\w{5,24}\b)[a-z]+(?:_\w+|[A-Z]\w*)\b")
"""Names of two words: single ones may be of the language, or of prose."""
_MOST_RENAMED = 6
_NUMBER = re.compile(r"(?<![\w.])\d{1,4}(?![\w.])")


@dataclass(frozen=True, slots=True)
class Change:
    """A change to one file."""

    key: str
    """Hexadecimal, as version control names changes."""
    author: str
    day: str
    subject: str
    path: str
    diff: str


def _changed(draw: Draw) -> tuple[str, str, str]:
    """Change some lines of a real file.

    Returns: a subject, the file's path, the difference.
    """
    library, rng = draw.library, draw.rng
    text = library.texts[library.draw_index(rng, "code")]
    lines = text.text.split("\n")
    start = rng.randrange(max(1, len(lines) - 40))
    shown = [line[:160] for line in lines[start : start + rng.randint(9, 30)]]
    sort, old, new, after = _edit(draw, shown)
    subject = rng.choice(phrases(f"subjects_{sort}", draw.language))
    path = code_title(text)
    fields = {"key": old, "other": new, "path": path}
    diff = difflib.unified_diff(shown, after, f"a/{path}", f"b/{path}", n=3, lineterm="")
    # Lines are counted from where the piece stands in its file.
    moved = [
        re.sub(r"(?<=[-+])\d+(?=,)", lambda found: str(int(found[0]) + start), line)
        if line.startswith("@@")
        else line
        for line in diff
    ]
    return fill(subject, fields), path, "\n".join(moved)


def _edit(draw: Draw, lines: list[str]) -> tuple[str, str, str, list[str]]:
    """Give the sort of change, what was and what is there now, and the lines after it."""
    rng = draw.rng
    counts = Counter(_NAME.findall("\n".join(lines)))
    names = sorted(name for name, count in counts.items() if count <= _MOST_RENAMED)
    numbered = [at for at, line in enumerate(lines) if _NUMBER.search(line)]
    sort = rng.choice(("rename", "number", "drop", "drop"))
    if sort == "rename" and names:
        old, new = rng.choice(names), next(identifiers(draw))
        return sort, old, new, [re.sub(rf"\b{old}\b", new, line) for line in lines]
    if sort == "number" and numbered:
        at = rng.choice(numbered)
        [old, *_] = _NUMBER.findall(lines[at])
        new = str(int(old) * rng.randint(2, 9) + 1)
        changed = _NUMBER.sub(new, lines[at], count=1)
        return sort, old, new, [*lines[:at], changed, *lines[at + 1 :]]
    told = [at for at, line in enumerate(lines) if sum(map(str.isalpha, line)) > 5]
    at = rng.choice(told or range(len(lines)))
    return "drop", lines[at].strip()[:50], "", [*lines[:at], *lines[at + rng.randint(1, 5) :]]


def _series(draw: Draw) -> tuple[list[Change], list[str]]:
    rng, dates = draw.rng, date_style(draw)
    authors = list(islice(people(draw), 8))
    form = rng.choice(
        (
            "commit {key}\nAuthor: {author}\nDate:   {day}\n\n    {subject}\n\n{diff}",
            "## {subject}\n{author}, {day} ({key})\n```diff\n{diff}\n```",
            "{key} {day} {author}: {subject}\n{diff}",
        )
    )

    def make() -> Change:
        subject, path, diff = _changed(draw)
        key = f"{rng.getrandbits(40):010x}"
        return Change(key, rng.choice(authors), day(draw).strftime(dates), subject, path, diff)

    def write(change: Change) -> str:
        names = ("key", "author", "day", "subject", "diff")
        # The difference is put in last: it may hold braces.
        return fill(form, {name: getattr(change, name) for name in names})

    changes = grow(draw, make, write)
    return changes, [write(change) for change in changes]


def change_series(draw: Draw) -> Made | None:
    """Many changes of code: which one touched a file or did a thing, by whom and when."""
    changes, written = _series(draw)
    asks = [Ask(wording="change_series/digest", max_new_tokens=220)]
    for change in at_most_one(draw, changes, lambda change: change.path):
        fields = {"path": change.path}
        asks.append(Ask(wording="change_series/touched", fields=fields, reference=change.key))
    for change in at_most_one(draw, changes, lambda change: change.subject):
        fields = {"quote": change.subject, "n": change.key}
        asks += [
            Ask(wording="change_series/author", fields=fields, reference=change.author),
            Ask(wording="change_series/day", fields=fields, reference=change.day),
            Ask(wording="change_series/explain", fields=fields, max_new_tokens=160),
        ]
    return asked(draw, written, asks)


def last_change(draw: Draw) -> Made | None:
    """Many changes of code, then one to explain, to review or to describe in a line."""
    _, written = _series(draw)
    subject, path, diff = _changed(draw)
    ask = Ask(
        wording="last_change",
        fields={"piece": diff, "path": path},
        reference=subject,
        max_new_tokens=160,
    )
    return asked_last(draw, "\n\n".join(written), ask)


KINDS = [
    Kind(name="change_series", weight=2, local=False, make=change_series),
    Kind(name="last_change", weight=3, local=True, make=last_change),
]
