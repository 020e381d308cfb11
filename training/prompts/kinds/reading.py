"""Kinds that look one place of a long text up: a sentence, a paragraph, a name, an answer."""

import re
from collections.abc import Mapping
from dataclasses import replace

from training.prompts.kinds.drawing import (
    Draw,
    Kind,
    Made,
    finish,
    lay_out,
    long_document,
    paragraphs_of,
    pick_question,
)
from training.prompts.kinds.sentences import (
    is_prose,
    mentions,
    names_of,
    opening,
    squeezed,
    unique_sentences,
)
from training.prompts.written import Question

PROSE = {
    "en": ("book", "essay", "novel", "story", "news", "report", "manual", "policy", "rfc", "mail"),
    "zh": ("book", "news", "news", "manual", "help", "man page", "review"),
}
_TALES = {"en": ("novel", "story", "play", "news", "essay", "book"), "zh": ("news", "book")}
_YES_NO = ("yes", "no", "是", "否", "不")


def prose(draw: Draw, registers: Mapping[str, tuple[str, ...]] = PROSE, share: float = 1.0) -> str:
    """Give a long text of one of the registers, as long as a share of the drawn length.

    Some works are short: another is drawn then.
    """
    library, tokens = draw.library, max(100, int(draw.tokens * share))
    for _ in range(5):
        group = f"{draw.language}/{draw.rng.choice(registers[draw.language])}"
        document = long_document(replace(draw, tokens=tokens), None, group)
        sample = library.texts[library.indices(group)[0]]
        if len(document) > 0.6 * library.chars(sample, tokens):
            break
    return document


def finish_sentence(draw: Draw) -> Made | None:
    """The beginning of a sentence of a long text, to be finished word by word."""
    document = prose(draw)
    sentences = unique_sentences(document, draw.language)
    if not sentences:
        return None
    sentence = draw.rng.choice(sentences)
    quote = opening(sentence, draw.language)
    text, position = lay_out(draw, "finish_sentence", paragraphs_of(document), {"quote": quote})
    rest = sentence.removeprefix(quote).strip()
    return finish(draw, text, position=position, reference=rest, max_new_tokens=80)


def gap(draw: Draw) -> Made | None:
    """A sentence of a long text with a gap to fill."""
    document = prose(draw)
    sentences = unique_sentences(document, draw.language)
    if not sentences:
        return None
    rng, sentence = draw.rng, draw.rng.choice(sentences)
    if draw.language == "zh":
        runs = [run for run in re.finditer(r"[\u4e00-\u9fff]{2,4}", sentence) if run.start() > 8]
        if not runs:
            return None
        run = rng.choice(runs)
        missing, before, after = run[0], sentence[: run.start()], sentence[run.end() :]
    else:
        words = sentence.split()
        places = [
            at for at, word in enumerate(words) if at > 5 and len(word) > 4 and word.isalpha()
        ]
        if not places:
            return None
        at = rng.choice(places)
        missing, before, after = (
            words[at],
            " ".join(words[:at]) + " ",
            " " + " ".join(words[at + 1 :]),
        )
    blank = rng.choice(("____", "(...)", "[?]", "_______"))
    fields = {"quote": f"{before}{blank}{after}", "n": blank}
    text, position = lay_out(draw, "gap", paragraphs_of(document), fields)
    return finish(draw, text, position=position, reference=missing, max_new_tokens=24)


def which_first(draw: Draw) -> Made | None:
    """Two sentences of a long text: which of them comes earlier."""
    document = prose(draw)
    sentences = unique_sentences(document, draw.language)
    if len(sentences) < 6:
        return None
    first, second = sorted(draw.rng.sample(range(len(sentences)), 2))
    shown = [sentences[first], sentences[second]]
    draw.rng.shuffle(shown)
    fields = {"quote": shown[0], "other": shown[1]}
    text, position = lay_out(draw, "which_first", paragraphs_of(document), fields)
    return finish(
        draw, text, position=position, reference=sentences[first], max_new_tokens=48, raw_share=0.05
    )


def mention(draw: Draw) -> Made | None:
    """The first or the last mention of a name in a long text, and what is said there."""
    for _ in range(3):
        document = prose(draw, _TALES)
        named = _often_named(draw, document)
        if named:
            break
    else:
        return None
    name, found = named
    first = draw.rng.random() < 0.5
    kind = "first_mention" if first else "last_mention"
    text, position = lay_out(draw, kind, paragraphs_of(document), {"name": name})
    reference = found[0] if first else found[-1]
    return finish(draw, text, position=position, reference=reference, max_new_tokens=96)


def _often_named(draw: Draw, document: str) -> tuple[str, list[str]] | None:
    """Draw a name that several sentences hold, and give these."""
    names = names_of(document, draw.language)
    draw.rng.shuffle(names)
    for name in names[:12]:
        found = mentions(document, name, draw.language)
        if len(found) > 1:
            return name, found
    return None


def paragraph_task(draw: Draw) -> Made | None:
    """Translate, simplify or shorten one paragraph of a long text, named by its first words."""
    document = prose(draw)
    low, high = (200, 1100) if draw.language == "en" else (60, 450)
    joined, parts = squeezed(document), paragraphs_of(document)
    fit = [
        part
        for part in parts
        if low <= len(part) <= high
        and is_prose(part, draw.language)
        and part.rstrip('"”').endswith((".", "!", "?", "。", "！", "？"))
        and joined.count(opening(part, draw.language)) == 1
    ]
    if not fit:
        return None
    fields = {"quote": opening(draw.rng.choice(fit), draw.language)}
    text, position = lay_out(draw, "paragraph_task", parts, fields)
    return finish(draw, text, position=position, max_new_tokens=256)


def wrong_answer(draw: Draw, question: Question, taken: tuple[str, ...] = ()) -> str:
    """Draw the answer of another question, as near in subject and type as there is one.

    Args:
        draw: the source of chance, and what was written.
        question: whose right answer is not to be drawn, nor one that says the same.
        taken: answers that are not to be drawn again.

    Returns: the answer; an empty string where there is none.
    """
    library = draw.library
    own = library.texts[question.passages[0].text_index]
    right = squeezed(question.answer).lower().rstrip(".。")
    ranked: dict[int, list[str]] = {}
    for other in draw.written.questions:
        said = other.answer.lower().rstrip(".。")
        same = said in right or right in said or said.startswith(_YES_NO)
        if other.language != question.language or same or other.answer in taken:
            continue
        text = library.texts[other.passages[0].text_index]
        distance = 0 if text is own else 1 if text.source == own.source else 2
        rank = distance + (0 if other.answer_type == question.answer_type else 2)
        ranked.setdefault(rank, []).append(other.answer)
    return draw.rng.choice(ranked[min(ranked)]) if ranked else ""


def content_question(draw: Draw) -> Question | None:
    """Draw a question whose answer is more than yes or no."""
    for _ in range(10):
        found: Question | None = pick_question(draw)
        if found and not found.answer.lower().startswith(_YES_NO):
            return found
    return None


def true_or_false(draw: Draw) -> Made | None:
    """Somebody's answer to a question about a long document: right or wrong."""
    question = content_question(draw)
    if not question:
        return None
    right = draw.rng.random() < 0.5
    claimed = question.answer if right else wrong_answer(draw, question)
    if not claimed:
        return None
    parts = paragraphs_of(long_document(draw, question.passages[0], ""))
    fields = {"question": question.question, "words": claimed.rstrip(".。")}
    text, position = lay_out(draw, "true_or_false", parts, fields)
    verdict = "right" if right else f"wrong: {question.answer}"
    return finish(draw, text, position=position, reference=verdict, max_new_tokens=64)


def choices(draw: Draw) -> Made | None:
    """A question about a long document with three to five answers to choose from."""
    question = content_question(draw)
    if not question:
        return None
    answers = [question.answer]
    for _ in range(draw.rng.randint(2, 4)):
        wrong = wrong_answer(draw, question, tuple(answers))
        answers += [wrong] if wrong else []
    if len(answers) < 3:
        return None
    draw.rng.shuffle(answers)
    style = draw.rng.choice(
        ("{letter}) ", "({letter}) ", "{letter}. ", "[{letter}] ", "{letter}: ")
    )
    letters = draw.rng.choice(("ABCDE", "abcde", "12345"))
    options = [
        style.replace("{letter}", letter) + answer
        for letter, answer in zip(letters, answers, strict=False)
    ]
    reference = options[answers.index(question.answer)]
    parts = paragraphs_of(long_document(draw, question.passages[0], ""))
    joint = "\n" if draw.rng.random() < 0.8 else "  "
    fields = {"question": question.question, "items": joint.join(options)}
    text, position = lay_out(draw, "choices", parts, fields)
    return finish(draw, text, position=position, reference=reference, max_new_tokens=32)


def cross_language(draw: Draw) -> Made | None:
    """A document in one language, and the request about it in another."""
    question = pick_question(draw)
    if not question:
        return None
    document = long_document(draw, question.passages[0], "")
    asking = replace(draw, language="zh" if draw.language == "en" else "en")
    fields = {"question": question.question}
    text, position = lay_out(asking, "cross_language", paragraphs_of(document), fields)
    # Some of the requests ask for the gist instead.
    reference = question.answer if question.question in text else ""
    return finish(draw, text, position=position, reference=reference, max_new_tokens=160)


KINDS = [
    Kind(name="finish_sentence", weight=1.5, local=False, make=finish_sentence),
    Kind(name="gap", weight=1.5, local=False, make=gap),
    Kind(name="which_first", weight=1.5, local=False, make=which_first),
    Kind(name="mention", weight=1.5, local=False, make=mention),
    Kind(name="paragraph_task", weight=2, local=False, make=paragraph_task),
    Kind(name="true_or_false", weight=2, local=False, make=true_or_false),
    Kind(name="choices", weight=2, local=False, make=choices),
    Kind(name="cross_language", weight=2, local=False, make=cross_language),
]
