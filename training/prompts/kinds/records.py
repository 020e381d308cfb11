"""Kinds on records of the same form, one after another: works, payments, people's answers."""

import datetime
import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice

from training.prompts.kinds.drawing import Draw, Kind, Made, fill
from training.prompts.kinds.entries import MOST_COUNTED, Ask, asked, at_most_one, grow
from training.prompts.kinds.pieces import date_style, day, people, sentence, title, titled
from training.prompts.wordings_file import phrases


def catalogue_records(draw: Draw) -> tuple[list[dict[str, str]], list[str], str]:
    """Make records of works: these by the names of their fields, as written, and the format."""
    rng = draw.rng
    names = list(phrases("record_fields", draw.language))
    authors, groups = (
        list(islice(people(draw), 5 + draw.tokens // 400)),
        phrases("record_groups", draw.language),
    )
    style, dates = rng.choice(("json", "jsonl", "xml", "yaml", "")), date_style(draw)
    number = rng.randint(100, 5000)

    def make() -> dict[str, str]:
        nonlocal number
        number += rng.randint(1, 9)
        price = f"{rng.randint(1, 400)}.{rng.randint(10, 99)}"
        values = (
            *(str(number), title(draw), rng.choice(authors), day(draw).strftime(dates)),
            *(rng.choice(groups), price, str(rng.randint(0, 300))),
        )
        return dict(zip(names, values, strict=True))

    def write(record: dict[str, str]) -> str:
        return _written_record(record, style)

    records = grow(draw, make, write)
    return records, [write(record) for record in records], style


def _written_record(record: dict[str, str], style: str) -> str:
    if style in ("json", "jsonl"):
        return json.dumps(record, ensure_ascii=False, indent=2 if style == "json" else None)
    if style == "xml":
        lines = [f"  <{name}>{value}</{name}>" for name, value in record.items()]
        return "\n".join(["<item>", *lines, "</item>"])
    marks = ("- ", "  ") if style == "yaml" else ("", "")
    return "\n".join(
        f"{marks[at > 0]}{name}: {value}" for at, (name, value) in enumerate(record.items())
    )


def records(draw: Draw) -> Made | None:
    """Records in JSON, XML or the like: a field of one of them, or which satisfy something."""
    rng = draw.rng
    found, written, style = catalogue_records(draw)
    identity, name, author, _, group, _, _ = found[0]
    asks = []
    for record in at_most_one(draw, found, lambda record: record[name]):
        key = rng.choice([key for key in record if key not in (identity, name)])
        fields = {"key": key, "name": record[name], "n": record[identity]}
        asks.append(Ask(wording="records/field", fields=fields, reference=record[key]))
        asks.append(Ask(wording="records/by_id", fields=fields, reference=record[key]))
    record = rng.choice(found)
    both = [
        other[identity]
        for other in found
        if (other[author], other[group]) == (record[author], record[group])
    ]
    fields = {"name": record[author], "key": identity, "other": record[group]}
    if len(both) <= MOST_COUNTED:
        listed = ", ".join(both)
        asks.append(
            Ask(wording="records/which", fields=fields, reference=listed, max_new_tokens=80)
        )
    count = sum(other[author] == record[author] for other in found)
    if count <= MOST_COUNTED:
        asks.append(Ask(wording="records/count", fields=fields, reference=str(count)))
    blocks = written if style in ("xml", "") else ["\n".join(written)]
    return asked(draw, blocks, asks, fence=style)


_REMARKS = {"en": ("mail", "essay", "story"), "zh": ("review",)}
"""Registers whose sentences people could have written."""


@dataclass(frozen=True, slots=True)
class Payment:
    """One line of a statement."""

    day: str
    payee: str
    category: str
    cents: int

    @property
    def amount(self) -> str:
        """The amount with two decimals."""
        return _money(self.cents)


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def payment_list(draw: Draw) -> tuple[list[Payment], list[str]]:
    """Make payments in the order of their days, and these as they are written."""
    rng = draw.rng
    categories = rng.sample(phrases("spending", draw.language), 10)
    weights = [2.0**-at for at in range(len(categories))]
    style, dates = rng.choice(("csv", "statement", "notes", "pipes")), date_style(draw)
    now, names = day(draw), people(draw)

    def make() -> Payment:
        nonlocal now
        now += datetime.timedelta(days=rng.choice((0, 0, 1, 2)))
        shop = titled(draw)
        payee = shop[0] if shop and rng.random() < 0.5 else next(names)
        [category] = rng.choices(categories, weights=weights)
        return Payment(now.strftime(dates), payee, category, int(rng.lognormvariate(8.5, 1.1)))

    def write(payment: Payment) -> str:
        cells = (payment.day, payment.payee, payment.category, payment.amount)
        if style == "csv":
            return ",".join(f'"{cell}"' if "," in cell else cell for cell in cells)
        if style == "statement":
            return f"{payment.day}  {payment.payee:<36} {payment.category:<14} {payment.amount:>10}"
        if style == "pipes":
            return f"| {' | '.join(cells)} |"
        return f"- {payment.day}: {payment.amount} {payment.payee} ({payment.category})"

    payments = grow(draw, make, write)
    return payments, [write(payment) for payment in payments]


def payments(draw: Draw) -> Made | None:
    """A statement of payments: what one was, the largest, the total of a category."""
    rng = draw.rng
    found, written = payment_list(draw)
    asks = []
    counts = Counter(payment.category for payment in found)
    few = sorted(name for name, count in counts.items() if count <= MOST_COUNTED)
    if few:
        category = rng.choice(few)
        own = [payment for payment in found if payment.category == category]
        fields = {"name": category}
        total = _money(sum(payment.cents for payment in own))
        most = max(own, key=lambda payment: payment.cents)
        asks += [
            Ask(wording="payments/total", fields=fields, reference=total, max_new_tokens=160),
            Ask(wording="payments/largest", fields=fields, reference=most.payee),
            Ask(wording="payments/count", fields=fields, reference=str(len(own))),
        ]
    for payment in at_most_one(draw, found, lambda payment: payment.payee):
        fields = {"name": payment.payee}
        asks.append(Ask(wording="payments/paid", fields=fields, reference=payment.amount))
        asks.append(Ask(wording="payments/day", fields=fields, reference=payment.day))
    return asked(draw, ["\n".join(written)], asks, fence="")


def survey(draw: Draw) -> Made | None:
    """Answers of many people to a questionnaire: what one said, who said a thing, how many."""
    rng, language = draw.rng, draw.language
    forms = rng.sample(phrases("survey_questions", language), rng.randint(2, 4))
    questions = [fill(form, {"title": title(draw)}) for form in forms]
    options = phrases("survey_options", language)
    likely = [rng.sample((0.75, 0.18, 0.07), 3) for _ in questions]
    names = people(draw)
    styled = rng.choice(("form", "line", "listed"))

    def make() -> tuple[str, list[str], str]:
        said = [rng.choices(options, weights=weights)[0] for weights in likely]
        return next(names), said, sentence(draw, registers=_REMARKS[language])

    def write(answer: tuple[str, list[str], str]) -> str:
        name, said, remark = answer
        if styled == "line":
            numbered = "; ".join(f"Q{at}: {word}" for at, word in enumerate(said, start=1))
            return f"{name} | {numbered} | {remark}"
        if styled == "listed":
            pairs = zip(questions, said, strict=True)
            return "\n".join([f"# {name}", *(f"- {ask} {word}" for ask, word in pairs), remark])
        return "\n".join(
            [name, *(f"{at}. {word}" for at, word in enumerate(said, 1)), f"> {remark}"]
        )

    answers = grow(draw, make, write)
    head = "\n".join(f"Q{at}: {question}" for at, question in enumerate(questions, start=1))
    at = rng.randrange(len(questions))
    name, said, _ = rng.choice(answers)
    asks = [
        Ask(
            wording="survey/said",
            fields={"name": name, "question": questions[at]},
            reference=said[at],
        )
    ]
    counts = Counter(said[at] for _, said, _ in answers)
    for word in [word for word in options if 0 < counts[word] <= MOST_COUNTED]:
        fields = {"value": word, "question": questions[at]}
        asks.append(Ask(wording="survey/count", fields=fields, reference=str(counts[word])))
    for name, _, remark in at_most_one(draw, answers, lambda answer: answer[2]):
        who = Ask(wording="survey/who", fields={"quote": remark}, reference=name)
        wrote = Ask(wording="survey/wrote", fields={"name": name}, reference=remark)
        asks += [who, wrote]
    return asked(draw, [head, *map(write, answers)], asks)


KINDS = [
    Kind(name="records", weight=2, local=False, make=records),
    Kind(name="payments", weight=2, local=False, make=payments),
    Kind(name="survey", weight=2, local=False, make=survey),
]
