"""Kinds whose answer is composed: outlines, titles, comparisons, replies, more in one style."""

from training.prompts.kinds.drawing import (
    Draw,
    Kind,
    Made,
    fill,
    finish,
    lay_out,
    paragraphs_of,
)
from training.prompts.kinds.reading import PROSE, prose
from training.prompts.kinds.sentences import opening, squeezed, unique_sentences
from training.prompts.wordings_file import choose, phrases

_STRUCTURED = {
    "en": ("book", "essay", "report", "rfc", "manual", "policy", "man page"),
    "zh": ("book", "manual", "man page", "news"),
}
_PEOPLED = {
    "en": ("novel", "story", "play", "news", "mail", "dialogue"),
    "zh": ("news", "dialogue"),
}
_STYLED = {
    "en": ("novel", "story", "play", "news", "man page", "rfc", "policy", "help"),
    "zh": ("news", "man page", "help", "review", "book"),
}


def _about_all(
    draw: Draw, kind: str, registers: dict[str, tuple[str, ...]], max_new_tokens: int
) -> Made:
    """A request about one long document as a whole."""
    parts = paragraphs_of(prose(draw, registers))
    text, position = lay_out(draw, kind, parts, {"n": str(draw.rng.randint(3, 8))})
    return finish(draw, text, position=position, max_new_tokens=max_new_tokens)


def outline(draw: Draw) -> Made | None:
    """An outline of a long document, or a table of its contents."""
    return _about_all(draw, "outline", _STRUCTURED, 256)


def title(draw: Draw) -> Made | None:
    """A title, a headline, keywords or an address for a long document."""
    return _about_all(draw, "title", PROSE, 40)


def people(draw: Draw) -> Made | None:
    """Who is who in a long story, play or piece of news."""
    return _about_all(draw, "people", _PEOPLED, 224)


def write_questions(draw: Draw) -> Made | None:
    """Questions for pupils, readers or an author to be written about a long document."""
    return _about_all(draw, "write_questions", PROSE, 224)


def extract_json(draw: Draw) -> Made | None:
    """Facts of a long document as JSON, YAML or CSV with given fields."""
    return _about_all(draw, "extract_json", PROSE, 200)


def text_sort(draw: Draw) -> Made | None:
    """What sort of text this is, for whom and how it is written: any part of it tells."""
    return _about_all(draw, "text_sort", PROSE, 80)


def compare_documents(draw: Draw) -> Made | None:
    """Two long documents to compare."""
    rng = draw.rng
    register = rng.choice(PROSE[draw.language])
    share = rng.uniform(0.3, 0.7)
    first = prose(draw, {draw.language: (register,)}, share)
    second = prose(draw, {draw.language: (register,)}, 1 - share)
    if first == second:
        return None
    heads = rng.choice(phrases("pair_heads", draw.language))
    parts = [f"{head}{document}" for head, document in zip(heads, (first, second), strict=True)]
    names = [head.strip(" \n:：#=<>-[]【】") for head in heads]
    fields = {"name": names[0], "other": names[1], "n": str(rng.randint(3, 8))}
    text, position = lay_out(draw, "compare_documents", parts, fields)
    return finish(draw, text, position=position, max_new_tokens=256)


def _mails(draw: Draw) -> list[tuple[str, str]]:
    """Draw mails up to the drawn length, each with its subject."""
    rng, library = draw.rng, draw.library
    found: dict[int, tuple[str, str]] = {}
    left = float(draw.tokens)
    for _ in range(600):
        if left < 60:
            break
        index = library.draw_index(rng, "en/mail")
        mail = library.texts[index]
        if index not in found:
            # No mail fills more than a third, so that there are several.
            most = max(1200, library.chars(mail, int(min(left, draw.tokens / 3))))
            words = mail.text if len(mail.text) <= most else mail.text[:most].rpartition("\n")[0]
            found[index] = (squeezed(mail.title), words)
            left -= len(words) / max(1, library.chars(mail, 1000)) * 1000
    return list(found.values())


def mail_reply(draw: Draw) -> Made | None:
    """A mailbox, and a reply to be written to one of its mails, named by its subject."""
    mails = _mails(draw)
    subjects = [subject for subject, _ in mails]
    fit = [subject for subject in subjects if subjects.count(subject) == 1]
    if len(mails) < 2 or not fit:
        return None
    parts = [words for _, words in mails]
    text, position = lay_out(draw, "mail_reply", parts, {"words": draw.rng.choice(fit)})
    return finish(draw, text, position=position, max_new_tokens=200)


def last_mail(draw: Draw) -> Made | None:
    """Other mails, then one to reply to."""
    mails = _mails(draw)
    wording = choose(draw.rng, "last_mail", draw.language)
    rule = draw.rng.choice(("\n\n", "\n\n---\n\n", "\n\n________________________________\n\n"))
    mailbox = rule.join(words for _, words in mails)
    pieces = [wording.lead, mailbox, wording.ask]
    return finish(draw, "\n\n".join(filter(None, pieces)), max_new_tokens=200)


def same_style(draw: Draw) -> Made | None:
    """A long text, then the first words of a new piece in the same style."""
    rng = draw.rng
    register = {draw.language: (rng.choice(_STYLED[draw.language]),)}
    document, other = prose(draw, register), prose(draw, register, share=0.3)
    beginnings = [
        sentence
        for sentence in unique_sentences(other, draw.language)
        if sentence not in squeezed(document)
    ]
    if not beginnings:
        return None
    wording = choose(rng, "same_style", draw.language)
    ask = fill(wording.ask, {"quote": opening(rng.choice(beginnings), draw.language)})
    parts = [wording.lead, document, ask]
    return finish(draw, "\n\n".join(filter(None, parts)), max_new_tokens=200)


KINDS = [
    Kind(name="outline", weight=2, local=False, make=outline),
    Kind(name="title", weight=2, local=False, make=title),
    Kind(name="people", weight=1.5, local=False, make=people),
    Kind(name="write_questions", weight=2, local=False, make=write_questions),
    Kind(name="extract_json", weight=2, local=False, make=extract_json),
    Kind(name="compare_documents", weight=2, local=False, make=compare_documents),
    Kind(name="mail_reply", weight=1.5, local=False, make=mail_reply, languages=("en",)),
    Kind(name="text_sort", weight=2, local=True, make=text_sort),
    Kind(name="last_mail", weight=2, local=True, make=last_mail, languages=("en",)),
    Kind(name="same_style", weight=2, local=True, make=same_style),
]
