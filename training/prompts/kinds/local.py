"""Kinds whose answer is made of what stands nearby, and those with several turns."""

from training.prompts.kinds.drawing import (
    Draw,
    Kind,
    Made,
    chat,
    fill,
    finish,
    long_document,
    longest_of,
    paragraphs_of,
    pick,
    pick_question,
)
from training.prompts.kinds.sums import make_problem
from training.prompts.wordings_file import choose, phrases

_PROSE = {
    "en": ("book", "essay", "novel", "story", "play", "manual", "news", "mail", "rfc", "quotes"),
    "zh": ("book", "news", "manual", "help", "dialogue", "man page", "review"),
}


def _document(draw: Draw, share: float = 1.0) -> str:
    """Give a long text, or several short ones."""
    group = f"{draw.language}/{draw.rng.choice(_PROSE[draw.language])}"
    shorter = Draw(draw.rng, draw.library, draw.written, int(draw.tokens * share), draw.language)
    return long_document(shorter, None, group)


def _piece(draw: Draw, low: int = 60, high: int = 700) -> str:
    """Draw a short paragraph."""
    register = draw.rng.choice(_PROSE[draw.language])
    for _ in range(20):
        index = draw.library.draw_index(draw.rng, f"{draw.language}/{register}")
        found = paragraphs_of(draw.library.run(draw.rng, index, 250))
        found = [piece for piece in found if len(piece) >= low]
        if found:
            return draw.rng.choice(found)[:high]
    return found[0] if found else draw.library.run(draw.rng, index, 120)


def continue_text(draw: Draw) -> Made | None:
    """Go on where a text stops."""
    index = longest_of(draw, f"{draw.language}/{draw.rng.choice(_PROSE[draw.language])}")
    run = draw.library.run(draw.rng, index, draw.tokens)
    cut = draw.rng.randrange(max(1, len(run) - 400), len(run)) if len(run) > 800 else len(run)
    shown = run[:cut].rsplit(" ", 1)[0]
    if draw.rng.random() < 0.55:
        return Made(prompt=shown, reference=run[cut:][:200], max_new_tokens=64)
    wording = choose(draw.rng, "continue_text", draw.language)
    first, last = [wording.lead, shown, wording.ask], [wording.ask, shown]
    parts = first if wording.may_follow and draw.rng.random() < 0.6 else last
    return finish(draw, "\n\n".join(part for part in parts if part), raw_share=0.1)


def edit_last(draw: Draw) -> Made | None:
    """A long text, then a short piece of another with something to do to it."""
    wording = choose(draw.rng, "edit_last", draw.language)
    ask = fill(wording.ask, {"piece": _piece(draw)})
    return finish(draw, f"{_document(draw)}\n\n{ask}", max_new_tokens=200, raw_share=0.05)


def last_paragraph(draw: Draw) -> Made | None:
    """Something to do with the last paragraph of a long text."""
    document = _document(draw)
    wording = choose(draw.rng, "last_paragraph", draw.language)
    if draw.rng.random() < 0.2 and wording.may_precede:
        text = f"{wording.ask}\n\n{document}"
    else:
        text = f"{document}\n\n{wording.ask}"
    return finish(draw, text, max_new_tokens=160, raw_share=0.05)


def unrelated_question(draw: Draw) -> Made | None:
    """A long text, then a question that has nothing to do with it."""
    question = _everyday(draw)
    bridge = draw.rng.choice(phrases("bridges", draw.language))
    return finish(draw, f"{_document(draw)}\n\n{bridge}{question}", max_new_tokens=128)


def _everyday(draw: Draw) -> str:
    """A question or a task that stands alone."""
    if draw.rng.random() < 0.3:
        return make_problem(draw.rng, draw.language).question
    return choose(draw.rng, "everyday", draw.language).ask


def format_list(draw: Draw) -> Made | None:
    """A long text, then a list to sort, number or put into a table."""
    rng, language = draw.rng, draw.language
    words = phrases("list_items", language)
    items = [f"{word}: {rng.randint(1, 99)}" for word in rng.sample(words, rng.randint(5, 14))]
    wording = choose(rng, "format_list", language)
    ask = fill(wording.ask, {"items": rng.choice(("\n", ", ", "; ")).join(items)})
    return finish(draw, f"{_document(draw)}\n\n{ask}", max_new_tokens=160, raw_share=0.05)


def chat_on(draw: Draw) -> Made | None:
    """A long talk with an assistant, and a new message that needs no more than itself."""
    turns = _history(draw)
    wording = _everyday(draw)
    if turns and draw.rng.random() < 0.45:
        wording = choose(draw.rng, "last_message", draw.language).ask
    return Made(messages=(*turns, {"role": "user", "content": wording}), max_new_tokens=128)


def _history(draw: Draw) -> tuple[dict[str, str], ...]:
    """Turns about written questions, abstracts and texts, up to the drawn length."""
    rng = draw.rng
    left = draw.tokens * (4.0 if draw.language == "en" else 1.5)
    turns: list[dict[str, str]] = []
    while left > 0 and len(turns) < 120:
        said, answered = _exchange(draw)
        if not turns:
            turns += chat(draw, said)
        else:
            turns.append({"role": "user", "content": said})
        turns.append({"role": "assistant", "content": answered})
        left -= len(said) + len(answered)
        if rng.random() < 0.02 and len(turns) > 6:
            break
    return tuple(turns)


def _exchange(draw: Draw) -> tuple[str, str]:
    """One question with material, and its answer as an assistant gives it."""
    rng = draw.rng
    question, abstract = pick_question(draw), pick(draw, draw.written.abstracts)
    if abstract and rng.random() < 0.4:
        ask = rng.choice(phrases("short_requests", draw.language))
        return f"{ask}\n\n{draw.library.words(abstract.passage)}", abstract.words
    if question:
        passage = draw.library.words(question.passages[0])
        return f"{passage}\n\n{question.question}", question.answer
    return choose(rng, "everyday", draw.language).ask, _piece(draw)


def follow_up(draw: Draw) -> Made | None:
    """A document and a question, answered; then another question about the same document."""
    question = pick_question(draw)
    if not question:
        return None
    document = long_document(draw, question.passages[0], "")
    index = question.passages[0].text_index
    same = [
        other
        for other in draw.written.questions
        if other.passages[0].text_index == index
        and other is not question
        and draw.library.words(other.passages[0]) in document
    ][:4]
    ask = choose(draw.rng, "single_qa", draw.language)
    first = (
        fill(ask.ask, {"question": same[0].question})
        if same
        else draw.rng.choice(phrases("short_requests", draw.language))
    )
    answered = same[0].answer if same else " ".join(document.split())[:200]
    turns = list(chat(draw, f"{document}\n\n{first}"))
    turns.append({"role": "assistant", "content": answered})
    for other in same[1:]:
        turns.append({"role": "user", "content": other.question})
        turns.append({"role": "assistant", "content": other.answer})
    last = choose(draw.rng, "follow_up", draw.language)
    turns.append({"role": "user", "content": fill(last.ask, {"question": question.question})})
    return Made(messages=tuple(turns), reference=question.answer, max_new_tokens=72)


def recall(draw: Draw) -> Made | None:
    """A long talk, and a question about one of its earlier messages."""
    turns = list(_history(draw))
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    if len(asked) < 3:
        return None
    place = draw.rng.randrange(len(asked) - 1)
    words = " ".join(asked[place].split()[:8])[:80]
    last = choose(draw.rng, "recall", draw.language)
    content = fill(last.ask, {"words": words, "n": str(place + 1)})
    turns.append({"role": "user", "content": content})
    return Made(messages=tuple(turns), max_new_tokens=96)


KINDS = [
    Kind(name="continue_text", weight=6, local=True, make=continue_text),
    Kind(name="edit_last", weight=4, local=True, make=edit_last),
    Kind(name="last_paragraph", weight=3, local=True, make=last_paragraph),
    Kind(name="unrelated_question", weight=4, local=True, make=unrelated_question),
    Kind(name="format_list", weight=2, local=True, make=format_list),
    Kind(name="chat_on", weight=4, local=True, make=chat_on),
    Kind(name="follow_up", weight=4, local=False, make=follow_up),
    Kind(name="recall", weight=2, local=False, make=recall),
]
