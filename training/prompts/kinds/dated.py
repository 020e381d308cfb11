"""Kinds on what has dates and times: mails, releases, a timetable, events, a transcript."""

import datetime
from collections import Counter
from dataclasses import dataclass
from itertools import islice, pairwise

from training.prompts.kinds.drawing import Draw, Kind, Made, fill, paragraphs_of, pick
from training.prompts.kinds.entries import MOST_COUNTED, Ask, asked, grow, once
from training.prompts.kinds.pieces import (
    code_path,
    date_style,
    day,
    identifiers,
    people,
    sentence,
    title,
)
from training.prompts.wordings_file import phrases


@dataclass(slots=True)
class Mail:
    """One mail of a thread."""

    sender: str
    time: str
    subject: str
    body: str


def _body(draw: Draw) -> str:
    """Give some paragraphs of a real mail, or of news and the like in Chinese."""
    library, rng = draw.library, draw.rng
    group = "en/mail" if draw.language == "en" else rng.choice(("zh/news", "zh/review", "zh/book"))
    text = library.texts[library.draw_index(rng, group)].text
    if text.startswith("From: "):
        text = text.partition("\n\n")[2]
    paragraphs = paragraphs_of(text)
    start = rng.randrange(max(1, len(paragraphs) - 2))
    room = rng.randint(120, 900) if draw.language == "en" else rng.randint(50, 300)
    kept: list[str] = []
    for paragraph in paragraphs[start:]:
        if kept and sum(map(len, kept)) + len(paragraph) > room:
            break
        kept.append(paragraph.strip()[: 2 * room])
    return "\n\n".join(kept) or sentence(draw)


def _mails(draw: Draw) -> tuple[list[Mail], list[str]]:
    rng, zh = draw.rng, draw.language == "zh"
    senders = list(islice(people(draw), rng.randint(4, 7)))
    subjects = [title(draw) for _ in range(rng.randint(1, 4))]
    dates, style = date_style(draw), rng.choice(("heads", "wrote", "short"))
    now = datetime.datetime.combine(day(draw), datetime.time(8, 30))

    def make() -> Mail:
        nonlocal now
        now += datetime.timedelta(minutes=rng.randint(3, 900))
        time = f"{now.strftime(dates)} {now:%H:%M}"
        return Mail(rng.choice(senders), time, rng.choice(subjects), _body(draw))

    def write(mail: Mail) -> str:
        if style == "wrote":
            said = (
                f"{mail.sender}于{mail.time}写道："
                if zh
                else f"On {mail.time}, {mail.sender} wrote:"
            )
            return f"{said}\n\n{mail.body}"
        if style == "short":
            return f"--- {mail.sender} | {mail.time} | {mail.subject}\n{mail.body}"
        names = ("发件人：", "时间：", "主题：") if zh else ("From: ", "Date: ", "Subject: ")
        values = (mail.sender, mail.time, f"Re: {mail.subject}")
        head = "\n".join(name + value for name, value in zip(names, values, strict=True))
        return f"{head}\n\n{mail.body}"

    mails = grow(draw, make, write)
    return mails, [write(mail) for mail in mails]


def mail_thread(draw: Draw) -> Made | None:
    """A thread of mails with heads: who wrote a thing and when, what a sender thinks."""
    rng = draw.rng
    mails, written = _mails(draw)
    mail = rng.choice(mails)
    fields = {"name": mail.sender, "value": mail.subject}
    last = [other for other in mails if other.sender == mail.sender][-1]
    asks = [
        Ask(wording="mail_thread/last", fields=fields, reference=last.time),
        Ask(wording="mail_thread/view", fields=fields, max_new_tokens=128),
    ]
    quote = mail.body.split("\n")[0][: 70 if draw.language == "en" else 28].strip()
    if sum(quote in other.body for other in mails) == 1:
        fields = {"quote": quote}
        asks.append(Ask(wording="mail_thread/who", fields=fields, reference=mail.sender))
        asks.append(Ask(wording="mail_thread/when", fields=fields, reference=mail.time))
    return asked(draw, written, asks)


def appointment(draw: Draw) -> Made | None:
    """A thread of mails in which people fix a time and change it: what holds in the end."""
    rng = draw.rng
    mails, _ = _mails(draw)
    days = rng.sample(phrases("weekdays", draw.language), 3)
    times = [f"{rng.randint(8, 18)}:{rng.choice(('00', '15', '30', '45'))}" for _ in range(3)]
    topic, places = title(draw), rng.sample(phrases("places", draw.language), 2)
    said = rng.choice(phrases("appointments", draw.language))
    for order, at in enumerate(sorted(rng.sample(range(len(mails)), len(said)))):
        fields = {
            "title": topic,
            "day": days[order],
            "time": times[order],
            "place": places[order > 0],
            "before": days[max(0, order - 1)],
        }
        paragraphs = paragraphs_of(mails[at].body)
        paragraphs.insert(rng.randrange(len(paragraphs) + 1), fill(said[order], fields))
        mails[at].body = "\n\n".join(paragraphs)
    parts = [f"{mail.sender} ({mail.time}):\n{mail.body}" for mail in mails]
    held = f"{days[len(said) - 1]} {times[len(said) - 1]}"
    asks = [
        Ask(wording="appointment/when", fields={"value": topic}, reference=held),
        Ask(wording="appointment/where", fields={"value": topic}, reference=places[1]),
    ]
    return asked(draw, parts, asks)


@dataclass(frozen=True, slots=True)
class Entry:
    """What a version changed."""

    sort: str
    """`added`, `replaced`, `fixed`, `docs` or `changed`."""
    key: str
    other: str
    """What takes the place of the key, where it is replaced."""
    words: str


@dataclass(frozen=True, slots=True)
class Release:
    """One version of a program."""

    version: str
    day: str
    entries: list[Entry]


def changelog(draw: Draw) -> Made | None:
    """A changelog: which version changed a thing, what takes its place, what a version brought."""
    rng = draw.rng
    names, dates = identifiers(draw), date_style(draw)
    number, now = [rng.randint(0, 4), 0, 0], day(draw, 2012, 2018)
    head = rng.choice(("## [{v}] - {d}", "Version {v} ({d})", "{v} / {d}", "# {v}\n{d}\n"))

    def entry() -> Entry:
        sort, words = rng.choice(phrases("changes", draw.language))
        key, other = next(names), next(names)
        fields = {"key": key, "other": other, "path": code_path(draw), "title": title(draw)}
        return Entry(sort, key, other, fill(words, fields))

    def make() -> Release:
        nonlocal now
        now += datetime.timedelta(days=rng.randint(4, 120))
        at = rng.choices((0, 1, 2), weights=(1, 5, 9))[0]
        number[at:] = [number[at] + 1, *[0] * (2 - at)]
        entries = [entry() for _ in range(rng.randint(1, 7))]
        return Release(".".join(map(str, number)), now.strftime(dates), entries)

    def write(release: Release) -> str:
        top = head.replace("{v}", release.version).replace("{d}", release.day)
        return "\n".join([top, *(f"- {each.words}" for each in release.entries)])

    releases = grow(draw, make, write)
    release = rng.choice(releases)
    fields = {"key": rng.choice(release.entries).key, "n": release.version}
    listed = "; ".join(each.words for each in release.entries)
    asks = [
        Ask(wording="changelog/version", fields=fields, reference=release.version),
        Ask(wording="changelog/day", fields=fields, reference=release.day),
        Ask(wording="changelog/brought", fields=fields, reference=listed, max_new_tokens=160),
    ]
    replaced = [each for one in releases for each in one.entries if each.sort == "replaced"]
    if replaced:
        gone = rng.choice(replaced)
        fields = {"key": gone.key, "n": release.version}
        asks.append(Ask(wording="changelog/instead", fields=fields, reference=gone.other))
    asks.append(Ask(wording="changelog/upgrade", fields=fields, max_new_tokens=200))
    return asked(draw, list(map(write, reversed(releases))), asks)


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a timetable."""

    day: str
    time: str
    title: str
    place: str
    person: str


def _calendar_style(draw: Draw) -> str:
    return draw.rng.choice(
        (
            "| {day} | {time} | {title} | {place} | {person} |",
            "{day} {time} {title} ({person}; {place})",
            "\n".join(
                (
                    *("BEGIN:VEVENT", "DTSTART:{day} {time}", "SUMMARY:{title}"),
                    *("LOCATION:{place}", "ORGANIZER:{person}", "END:VEVENT"),
                )
            ),
            "{day}, {time}\n  {title}\n  {person}, {place}",
        )
    )


def timetable(draw: Draw) -> Made | None:
    """A timetable: what is on at a time, what comes next, when and where something is."""
    rng = draw.rng
    places, hosts = phrases("places", draw.language), list(islice(people(draw), 30))
    dates, style = date_style(draw), _calendar_style(draw)
    now = datetime.datetime.combine(day(draw), datetime.time(8))

    def make() -> Event:
        nonlocal now
        now += datetime.timedelta(minutes=rng.choice((30, 45, 60, 90, 120)))
        if now.hour > 18 or now.hour < 8:
            now = datetime.datetime.combine(now.date(), datetime.time(8, 30))
            now += datetime.timedelta(days=1)
        moment = (now.strftime(dates), f"{now:%H:%M}")
        return Event(*moment, title(draw), rng.choice(places), rng.choice(hosts))

    def write(event: Event) -> str:
        names = ("day", "time", "title", "place", "person")
        return fill(style, {name: getattr(event, name) for name in names})

    events = grow(draw, make, write)
    alone = {event.title for event in once(events, lambda event: event.title)}
    pairs = [(one, two) for one, two in pairwise(events) if one.title in alone]
    if not pairs:
        return None
    event, after = rng.choice(pairs)
    fields = {"quote": event.title, "value": event.day, "time": event.time, "name": event.person}
    moment = f"{event.day} {event.time}"
    asks = [
        Ask(wording="timetable/at", fields=fields, reference=event.title),
        Ask(wording="timetable/next", fields=fields, reference=after.title),
        Ask(wording="timetable/when", fields=fields, reference=moment),
        Ask(wording="timetable/where", fields=fields, reference=event.place),
    ]
    own = [
        other.title for other in events if (other.day, other.person) == (event.day, event.person)
    ]
    listed = "; ".join(own)
    asks.append(Ask(wording="timetable/own", fields=fields, reference=listed, max_new_tokens=80))
    days: dict[str, list[str]] = {}
    for one in events:
        days.setdefault(one.day, []).append(write(one))
    return asked(draw, ["\n".join(lines) for lines in days.values()], asks)


def dated_events(draw: Draw) -> Made | None:
    """Dated notes in no order: which came first, when a thing was, what a month brought."""
    rng = draw.rng
    dates = date_style(draw)
    form = rng.choice(("{d}: {s}", "[{d}] {s}", "* {d} {s}", "{s} ({d})"))

    def make() -> tuple[datetime.date, str]:
        return day(draw, 1996, 2025), sentence(draw, 220)

    def write(event: tuple[datetime.date, str]) -> str:
        return form.replace("{d}", event[0].strftime(dates)).replace("{s}", event[1])

    events = once(grow(draw, make, write), lambda event: event[1])
    alone = once(events, lambda event: event[0])
    if len(alone) < 2:
        return None
    one, two = rng.sample(alone, 2)
    first = min(one, two)
    fields = {"quote": _start(draw, one[1]), "other": _start(draw, two[1])}
    month = one[0].strftime("%B %Y" if draw.language == "en" else "%Y年%m月")
    same = [
        words for when, words in sorted(events) if (when.year, when.month) == one[0].timetuple()[:2]
    ]
    value = {"value": one[0].strftime(dates), "n": month}
    asks = [
        Ask(wording="dated_events/first", fields=fields, reference=_start(draw, first[1])),
        Ask(wording="dated_events/when", fields=fields, reference=value["value"]),
        Ask(wording="dated_events/what", fields=value, reference=one[1], max_new_tokens=80),
    ]
    if len(same) <= MOST_COUNTED:
        listed = "\n".join(same)
        asks.append(
            Ask(wording="dated_events/month", fields=value, reference=listed, max_new_tokens=160)
        )
    return asked(draw, list(map(write, events)), asks)


def _start(draw: Draw, words: str) -> str:
    return words[:14] if draw.language == "zh" else " ".join(words.split()[:8])


@dataclass(frozen=True, slots=True)
class Turn:
    """What somebody says at some time."""

    time: str
    name: str
    words: str


def transcript_turns(draw: Draw) -> tuple[list[Turn], list[str]]:
    """Make a transcript of written talk or of sentences: turns, and these as they are written."""
    rng = draw.rng
    speakers = list(islice(people(draw), rng.randint(2, 6)))
    form = rng.choice(("[{t}] {name}: {words}", "{t} {name}\n{words}\n", "{name} ({t}) {words}"))
    seconds = rng.randrange(3600)
    talk: list[str] = []

    def make() -> Turn:
        nonlocal seconds, talk
        seconds += rng.randint(3, 40)
        if not talk:
            found = pick(draw, draw.written.dialogues) if rng.random() < 0.7 else None
            talk = [turn.partition(": ")[2] for turn in found.turns] if found else []
            talk = [words.strip('"“” ') for words in talk] or [sentence(draw)]
        time = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        return Turn(time, rng.choice(speakers), talk.pop(0))

    def write(turn: Turn) -> str:
        return fill(form, {"t": turn.time, "name": turn.name, "words": turn.words})

    turns = grow(draw, make, write)
    return turns, [write(turn) for turn in turns]


def transcript(draw: Draw) -> Made | None:
    """A transcript with times: what was said at one, by whom, when something was said."""
    rng = draw.rng
    turns, written = transcript_turns(draw)
    at = rng.randrange(len(turns) - 1)
    turn = turns[at]
    until = turns[min(len(turns) - 1, at + rng.randint(5, 30))]
    fields = {"time": turn.time, "other": until.time, "quote": turn.words[:90], "name": turn.name}
    asks = [
        Ask(wording="transcript/said", fields=fields, reference=turn.words, max_new_tokens=80),
        Ask(wording="transcript/speaker", fields=fields, reference=turn.name),
        Ask(wording="transcript/between", fields=fields, max_new_tokens=160),
    ]
    if sum(fields["quote"] in other.words for other in turns) == 1:
        asks.append(Ask(wording="transcript/when", fields=fields, reference=turn.time))
    counts = Counter(other.name for other in turns)
    [(name, _)] = counts.most_common(1)
    asks.append(Ask(wording="transcript/most", reference=name))
    blocks = ["\n".join(written[begin : begin + 12]) for begin in range(0, len(written), 12)]
    return asked(draw, blocks, asks)


KINDS = [
    Kind(name="mail_thread", weight=2, local=False, make=mail_thread),
    Kind(name="appointment", weight=2, local=False, make=appointment),
    Kind(name="changelog", weight=2, local=False, make=changelog),
    Kind(name="timetable", weight=2, local=False, make=timetable),
    Kind(name="dated_events", weight=2, local=False, make=dated_events),
    Kind(name="transcript", weight=2, local=False, make=transcript),
]
