"""Kinds that need their far context: questions, summaries, retrieval, counting, extraction."""

from training.prompts.kinds.drawing import (
    Draw,
    Kind,
    Made,
    finish,
    headed,
    lay_out,
    long_document,
    paragraphs_of,
    pick,
    pick_question,
)
from training.prompts.passages import Passage
from training.prompts.wordings_file import phrases
from training.prompts.written import Question


def _hint(draw: Draw, name: str = "short_hints", share: float = 0.6) -> str:
    return draw.rng.choice(phrases(name, draw.language)) if draw.rng.random() < share else ""


def single_qa(draw: Draw) -> Made | None:
    """A written question about a passage within one long document."""
    question = pick_question(draw)
    if not question:
        return None
    parts = paragraphs_of(long_document(draw, question.passages[0], ""))
    text, position = lay_out(draw, "single_qa", parts, {"question": question.question}, _hint(draw))
    return finish(draw, text, position=position, reference=question.answer, max_new_tokens=72)


def multi_qa(draw: Draw) -> Made | None:
    """A written question, and many passages of other documents around its own."""
    question = pick_question(draw)
    return _among_others(draw, question, "multi_qa") if question else None


def two_document_qa(draw: Draw) -> Made | None:
    """A question whose answer needs two of the passages."""
    question = pick_question(draw, "two_facts")
    return _among_others(draw, question, "multi_qa") if question else None


def _among_others(draw: Draw, question: Question, kind: str) -> Made:
    needles = [draw.library.words(passage) for passage in question.passages]
    pieces = needles + other_passages(draw, question.passages, sum(map(len, needles)))
    draw.rng.shuffle(pieces)
    text, position = lay_out(
        draw, kind, headed(draw, pieces), {"question": question.question}, _hint(draw)
    )
    return finish(draw, text, position=position, reference=question.answer, max_new_tokens=72)


def other_passages(draw: Draw, around: tuple[Passage, ...], chars: int) -> list[str]:
    """Draw passages up to the drawn length; a third of them of the same works as those given."""
    library, rng = draw.library, draw.rng
    first = library.texts[around[0].text_index]
    group = "code" if first.is_code else draw.language
    near = [f"source/{library.texts[passage.text_index].source}" for passage in around]
    wanted, found = library.chars(first, draw.tokens), []
    taken = {(passage.text_index, passage.start) for passage in around}
    for _ in range(400):
        if chars >= wanted:
            break
        passage = library.passage(rng, rng.choice(near) if rng.random() < 0.33 else group)
        overlaps = any(
            passage.text_index == other.text_index
            and passage.start < other.end
            and other.start < passage.end
            for other in around
        )
        if not overlaps and (passage.text_index, passage.start) not in taken:
            taken.add((passage.text_index, passage.start))
            words = library.words(passage)
            if rng.random() < 0.5:
                words = words[: max(300, int(len(words) * rng.uniform(0.3, 1.0)))].rstrip()
            found.append(words)
            chars += len(words)
    return found


_REPORTS: dict[str, tuple[str, ...]] = {
    "en": ("report", "essay", "rfc", "policy", "book", "story", "novel", "manual"),
    "zh": ("book", "manual", "help", "man page"),
}
_NEWS: dict[str, tuple[str, ...]] = {"en": ("news", "news", "mail", "report"), "zh": ("news",)}


def summary_report(draw: Draw) -> Made | None:
    """Summarise one long document."""
    register = draw.rng.choice(_REPORTS[draw.language])
    document = long_document(draw, None, f"{draw.language}/{register}")
    text, position = lay_out(
        draw, "summary_report", paragraphs_of(document), {}, _hint(draw, "summary_hints", 0.4)
    )
    return finish(draw, text, position=position, max_new_tokens=256)


def summary_news(draw: Draw) -> Made | None:
    """Summarise several pieces of news, mails or short reports together."""
    group = f"{draw.language}/{draw.rng.choice(_NEWS[draw.language])}"
    pieces: list[str] = []
    left = draw.tokens
    while left > 60 and len(pieces) < 60:
        index = draw.library.draw_index(draw.rng, group)
        size = min(left, draw.rng.randint(200, 1800))
        pieces.append(draw.library.run(draw.rng, index, size))
        left -= max(60, size)
    text, position = lay_out(
        draw, "summary_news", headed(draw, pieces), {}, _hint(draw, "summary_hints", 0.4)
    )
    return finish(draw, text, position=position, max_new_tokens=256)


def _conversation(draw: Draw) -> str:
    """Give a long conversation: written ones one after another, or plays and game dialogues."""
    rng = draw.rng
    wanted = draw.tokens * (4 if draw.language == "en" else 1.5)
    if rng.random() < 0.6 and pick(draw, draw.written.dialogues):
        turns: list[str] = []
        while sum(map(len, turns)) < wanted and len(turns) < 3000:
            found = pick(draw, draw.written.dialogues)
            turns += found.turns
        return "\n".join(turns)
    register = rng.choice(("play", "dialogue") if draw.language == "en" else ("dialogue",))
    return long_document(draw, None, f"{draw.language}/{register}")


def summary_dialogue(draw: Draw) -> Made | None:
    """Summarise a meeting or another long conversation, or what one asks about it."""
    parts = _conversation(draw).split("\n")
    blocks = ["\n".join(parts[at : at + 12]) for at in range(0, len(parts), 12)]
    text, position = lay_out(
        draw, "summary_dialogue", blocks, {}, _hint(draw, "summary_hints", 0.3)
    )
    return finish(draw, text, position=position, max_new_tokens=220)


def dialogue_qa(draw: Draw) -> Made | None:
    """Who said a thing, what came next, or what a speaker said about something."""
    lines = [line for line in _conversation(draw).split("\n") if len(line) > 20]
    spoken = [
        at for at, line in enumerate(lines[:-1]) if line[:30].find(":") >= 1 or "：" in line[:12]
    ]
    if len(spoken) < 4:
        return None
    at = draw.rng.choice(spoken)
    name, _, words = lines[at].replace("：", ":", 1).partition(":")
    words = words.strip()
    quote = words[: draw.rng.randint(30, 90)].strip()
    blocks = ["\n".join(lines[begin : begin + 12]) for begin in range(0, len(lines), 12)]
    fields = {"quote": quote, "name": name.strip()}
    text, position = lay_out(draw, "dialogue_qa", blocks, fields)
    return finish(draw, text, position=position, reference=name.strip(), max_new_tokens=64)


def retrieve_abstract(draw: Draw) -> Made | None:
    """Which of many paragraphs an abstract belongs to."""
    abstract = pick(draw, draw.written.abstracts)
    if not abstract:
        return None
    own = draw.library.words(abstract.passage)
    pieces = [own, *other_passages(draw, (abstract.passage,), len(own))]
    draw.rng.shuffle(pieces)
    label = draw.rng.choice(phrases("labels", draw.language))
    numbered = [
        f"{label.replace('{n}', str(at))}{' '.join(piece.split())}"
        for at, piece in enumerate(pieces, start=1)
    ]
    fields = {"abstract": abstract.words, "label": label.replace("{n}", "7").strip(": ：")}
    text, position = lay_out(draw, "retrieve", numbered, fields)
    reference = label.replace("{n}", str(pieces.index(own) + 1)).strip(": ：")
    return finish(draw, text, position=position, reference=reference, max_new_tokens=24)


def count_passages(draw: Draw) -> Made | None:
    """How many different paragraphs there are among repeated ones."""
    passage = draw.library.passage(draw.rng, draw.language)
    pool = other_passages(draw, (passage,), 0)
    distinct = pool[: max(2, int(len(pool) * draw.rng.uniform(0.3, 1.0)))]
    shown = distinct + [draw.rng.choice(distinct) for _ in range(len(pool) - len(distinct))]
    draw.rng.shuffle(shown)
    text, position = lay_out(draw, "count_passages", headed(draw, shown), {})
    return finish(draw, text, position=position, reference=str(len(distinct)), max_new_tokens=24)


def extraction(draw: Draw) -> Made | None:
    """Collect names, numbers, commands or terms from a long text."""
    group = "code" if draw.language == "en" and draw.rng.random() < 0.2 else draw.language
    document = long_document(draw, None, group)
    kind = "extract_code" if group == "code" else "extract"
    text, position = lay_out(draw, kind, paragraphs_of(document), {})
    return finish(draw, text, position=position, max_new_tokens=160)


def open_request(draw: Draw) -> Made | None:
    """A request that a writer wrote for a passage, with much more text around it."""
    request = pick(draw, draw.written.instructions)
    if not request:
        return None
    parts = paragraphs_of(long_document(draw, request.passage, ""))
    text, position = lay_out(draw, "open_request", parts, {"request": request.words})
    return finish(draw, text, position=position, max_new_tokens=160)


KINDS = [
    Kind(name="single_qa", weight=9, local=False, make=single_qa),
    Kind(name="multi_qa", weight=8, local=False, make=multi_qa),
    Kind(name="two_document_qa", weight=5, local=False, make=two_document_qa),
    Kind(name="summary_report", weight=5, local=False, make=summary_report),
    Kind(name="summary_news", weight=4, local=False, make=summary_news),
    Kind(name="summary_dialogue", weight=3, local=False, make=summary_dialogue),
    Kind(name="dialogue_qa", weight=2, local=False, make=dialogue_qa),
    Kind(name="retrieve_abstract", weight=5, local=False, make=retrieve_abstract),
    Kind(name="count_passages", weight=2, local=False, make=count_passages),
    Kind(name="extraction", weight=3, local=False, make=extraction),
    Kind(name="open_request", weight=3, local=False, make=open_request),
]
