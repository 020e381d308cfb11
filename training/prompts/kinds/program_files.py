"""Kinds on files that programs write and read: a log, settings."""

import datetime
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from training.prompts.kinds.drawing import Draw, Kind, Made, fill
from training.prompts.kinds.entries import MOST_COUNTED, Ask, asked, grow, once
from training.prompts.kinds.pieces import code_path, day, identifiers, people, title
from training.prompts.wordings_file import phrases


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a log."""

    time: str
    level: str
    part: str
    message: str


def log_lines(draw: Draw) -> tuple[list[LogLine], list[str]]:
    """Make a log with one crash in it: its lines, and these as they are written."""
    rng = draw.rng
    parts = sorted({code_path(draw).rsplit("/", 1)[-1].partition(".")[0] for _ in range(12)})
    style = rng.choice(
        (
            "{time} {level} [{part}] {message}",
            "{time} host-7 {part}[412]: {level}: {message}",
            '{"ts": "{time}", "level": "{level}", "logger": "{part}", "msg": "{message}"}',
            "[{level}] {time} {part} - {message}",
            "{part} | {time} | {level} | {message}",
        )
    )
    now = datetime.datetime.combine(day(draw), datetime.time(rng.randrange(24), 5))

    def make() -> LogLine:
        nonlocal now
        now += datetime.timedelta(seconds=int(rng.expovariate(1 / 40)) + 1)
        level, words = rng.choice(phrases("log_messages", draw.language))
        return LogLine(f"{now:%Y-%m-%d %H:%M:%S}", level, rng.choice(parts), _message(draw, words))

    def write(line: LogLine) -> str:
        names = ("time", "level", "part", "message")
        return fill(style, {name: getattr(line, name) for name in names})

    lines = grow(draw, make, write)
    at = rng.randrange(len(lines) // 4 + 1, len(lines))
    crash = fill(rng.choice(phrases("crashes", draw.language)), {"path": code_path(draw)})
    lines[at] = LogLine(lines[at].time, "FATAL", lines[at].part, crash)
    return lines, [write(line) for line in lines]


def _message(draw: Draw, words: str) -> str:
    fields = {"n": str(draw.rng.randint(2, 9000)), "few": str(draw.rng.randint(2, 9))}
    if "{path}" in words:
        fields["path"] = code_path(draw)
    if "{title}" in words:
        fields["title"] = title(draw)
    if "{name}" in words:
        fields["name"] = next(people(draw))
    return fill(words, fields)


def program_log(draw: Draw) -> Made | None:
    """A program's log: when or how often something happened, and what stood before the crash."""
    rng = draw.rng
    lines, written = log_lines(draw)
    crash = next(at for at, line in enumerate(lines) if line.level == "FATAL")
    asks = [
        Ask(wording="program_log/before", reference=lines[crash - 1].message, max_new_tokens=80)
    ]
    alone = once(lines, lambda line: line.message)
    if alone:
        line = rng.choice(alone)
        asks.append(
            Ask(
                wording="program_log/when",
                fields={"quote": line.message},
                reference=line.time,
            )
        )
        asks.append(
            Ask(
                wording="program_log/what",
                fields={"time": line.time},
                reference=line.message,
                max_new_tokens=80,
            )
        )
    errors = Counter(line.part for line in lines if line.level == "ERROR")
    few = sorted(part for part, count in errors.items() if count <= MOST_COUNTED)
    if few:
        part = rng.choice(few)
        asks.append(
            Ask(
                wording="program_log/count",
                fields={"name": part},
                reference=str(errors[part]),
                max_new_tokens=32,
            )
        )
    return asked(draw, ["\n".join(written)], asks, fence="")


@dataclass(frozen=True, slots=True)
class Section:
    """Settings of one part of a program."""

    name: str
    note: str
    values: dict[str, Any]


def _setting(draw: Draw) -> Any:
    rng = draw.rng
    return rng.choice(
        (
            rng.randint(1, 65535),
            rng.randint(1, 99) * 10,
            rng.random() < 0.5,
            code_path(draw),
            f"{rng.randint(1, 90)}{rng.choice(('s', 'ms', 'm', 'MiB', 'h'))}",
            rng.choice(phrases("key_words", "en")),
            f"{rng.choice(phrases('key_words', 'en'))}-{rng.randint(1, 40)}.internal",
        )
    )


def settings_sections(draw: Draw) -> tuple[list[Section], list[str], str]:
    """Make a file of settings: sections, these as they are written, and the format's name."""
    style = draw.rng.choice(("ini", "yaml", "env", "json"))
    names = identifiers(draw)

    def make() -> Section:
        keys = [next(names) for _ in range(draw.rng.randint(3, 8))]
        keys = [key.upper() for key in keys] if style == "env" else keys
        values = {key: _setting(draw) for key in keys}
        return Section(next(names).replace("_", "-"), title(draw), values)

    def write(section: Section) -> str:
        return _written_section(section, style)

    sections = grow(draw, make, write)
    written = [write(section) for section in sections]
    if style == "json":
        written = [f"{inner}," for inner in written]
        written[0], written[-1] = "{\n" + written[0], written[-1].rstrip(",") + "\n}"
    return sections, written, style


def _written_section(section: Section, style: str) -> str:
    plain = {key: _plain(value) for key, value in section.values.items()}
    if style == "ini":
        lines = [f"; {section.note}", f"[{section.name}]"]
        return "\n".join(lines + [f"{key} = {value}" for key, value in plain.items()])
    if style == "yaml":
        lines = [f"# {section.note}", f"{section.name}:"]
        return "\n".join(lines + [f"  {key}: {value}" for key, value in plain.items()])
    if style == "env":
        head = section.name.upper().replace("-", "_")
        lines = [f"# {section.note} ({section.name})"]
        return "\n".join(lines + [f"{head}__{key}={value}" for key, value in plain.items()])
    inner = {"description": section.note, **section.values}
    # Without the outer braces, which stand around all sections.
    return json.dumps({section.name: inner}, ensure_ascii=False, indent=2)[2:-2]


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def settings(draw: Draw) -> Made | None:
    """A long file of settings: the value of a key, where a key stands, what has a value."""
    rng = draw.rng
    sections, written, style = settings_sections(draw)
    section = rng.choice(sections)
    key, value = rng.choice(list(section.values.items()))
    fields = {"key": key, "place": section.name, "value": _plain(value), "quote": section.note}
    asks = [
        Ask(wording="settings/value", fields=fields, reference=_plain(value)),
        Ask(wording="settings/section", fields=fields, reference=section.name),
    ]
    everywhere = Counter(_plain(value) for part in sections for value in part.values.values())
    if everywhere[_plain(value)] == 1:
        asks.append(Ask(wording="settings/key", fields=fields, reference=key))
    if len(once(sections, lambda part: part.note)) == len(sections):
        keys = ", ".join(section.values)
        asks.append(Ask(wording="settings/list", fields=fields, reference=keys, max_new_tokens=96))
    return asked(draw, written, asks, fence="" if style == "env" else style)


KINDS = [
    Kind(name="program_log", weight=2, local=False, make=program_log),
    Kind(name="settings", weight=2, local=False, make=settings),
]
