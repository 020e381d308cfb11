"""Kinds of several turns, or with rules before them: corrections, new documents, proof-reading."""

from dataclasses import replace

from training.prompts.kinds.drawing import (
    Draw,
    Kind,
    Made,
    chat,
    fill,
    finish,
    long_document,
    paragraphs_of,
    pick,
    pick_question,
)
from training.prompts.kinds.reading import content_question, prose, wrong_answer
from training.prompts.kinds.sentences import misspell, sentences_of
from training.prompts.wordings_file import choose, phrases, wordings
from training.prompts.written import Question

_HANDBOOKS = ("manual", "help", "man page", "policy", "book", "faq", "rfc", "report", "review")


def correction(draw: Draw) -> Made | None:
    """A document, a question and an answer, mostly a wrong one; the user wants it checked."""
    question = content_question(draw)
    if not question:
        return None
    said = wrong_answer(draw, question) if draw.rng.random() < 0.75 else question.answer
    if not said:
        return None
    document = long_document(draw, question.passages[0], "")
    ask = fill(choose(draw.rng, "single_qa", draw.language).ask, {"question": question.question})
    doubt = choose(draw.rng, "correction", draw.language).ask
    turns = (
        *chat(draw, f"{document}\n\n{ask}"),
        {"role": "assistant", "content": said},
        {"role": "user", "content": fill(doubt, {"words": said, "question": question.question})},
    )
    return Made(messages=turns, reference=question.answer, max_new_tokens=96)


def new_document(draw: Draw) -> Made | None:
    """A long document earlier in a chat, then a short one and a question about it alone."""
    question, before = pick_question(draw), _answered_before(draw)
    if not question or not before:
        return None
    own = draw.library.words(question.passages[0])
    wording = choose(draw.rng, "new_document", draw.language, follow=False)
    ask = fill(wording.ask, {"piece": own, "question": question.question})
    if own in before[-2]["content"]:
        return None
    turns = (*before, {"role": "user", "content": ask})
    return Made(messages=turns, reference=question.answer, max_new_tokens=72)


def _answered_before(draw: Draw) -> tuple[dict[str, str], ...]:
    """Turns about a long document: a question or its gist, and what an assistant answered."""
    shorter = replace(draw, tokens=max(200, draw.tokens - 400))
    abstract, question = pick(draw, draw.written.abstracts), pick_question(draw)
    if abstract and draw.rng.random() < 0.5:
        ask = draw.rng.choice(phrases("short_requests", draw.language))
        text = f"{ask}\n\n{long_document(shorter, abstract.passage, '')}"
        return (*chat(draw, text), {"role": "assistant", "content": abstract.words})
    if not question:
        return ()
    text = f"{long_document(shorter, question.passages[0], '')}\n\n{question.question}"
    return (*chat(draw, text), {"role": "assistant", "content": question.answer})


def rules_first(draw: Draw) -> Made | None:
    """A system message of a house's papers with rules on answers in them, then a short question."""
    question = _handbook_question(draw)
    if not question:
        return None
    rng = draw.rng
    parts = paragraphs_of(long_document(draw, question.passages[0], ""))
    rules = [wording.ask for wording in wordings("answer_rule", draw.language)]
    rules = rng.sample(rules, rng.randint(1, 2))
    for rule in rules:
        parts.insert(rng.randrange(len(parts) + 1), rule)
    intro = choose(rng, "rules_intro", draw.language, follow=False).ask
    turns = (
        {"role": "system", "content": "\n\n".join([intro, *parts])},
        {"role": "user", "content": question.question},
    )
    reference = "\n".join([question.answer, *rules])
    return Made(messages=turns, position="start", reference=reference, max_new_tokens=96)


def _handbook_question(draw: Draw) -> Question | None:
    """Draw a question about a text that a help desk might have."""
    for _ in range(30):
        found: Question | None = pick_question(draw)
        if found and draw.library.texts[found.passages[0].text_index].register in _HANDBOOKS:
            return found
    return None


def proofread(draw: Draw) -> Made | None:
    """A long text whose last paragraph has slips in it, and is to be proof-read alone."""
    found = sentences_of(prose(draw, share=0.1), draw.language)
    if len(found) < 2:
        return None
    at = draw.rng.randrange(len(found) - 1)
    joint = "" if draw.language == "zh" else " "
    right = joint.join(found[at : at + draw.rng.randint(2, 5)])
    wrong = misspell(draw.rng, right, draw.language, draw.rng.randint(2, 6))
    ask = choose(draw.rng, "proofread", draw.language).ask
    text = f"{prose(draw)}\n\n{wrong}\n\n{ask}"
    return finish(draw, text, reference=right, max_new_tokens=224, raw_share=0.05)


def proofread_chat(draw: Draw) -> Made | None:
    """A long chat in which sentence after sentence is sent, and sent back without its slips."""
    rng = draw.rng
    document = prose(draw, share=1.5)
    sentences = sentences_of(document, draw.language)
    # Sentences stand there twice; the marks of a chat's turns take some of the length.
    left = 0.6 * len(document)
    if len(sentences) < 6 or 2 * sum(map(len, sentences)) < 0.6 * left:
        return None
    ask = choose(rng, "proofread_chat", draw.language).ask
    turns: list[dict[str, str]] = []
    for right in sentences:
        wrong = misspell(rng, right, draw.language, rng.choice((0, 1, 1, 2, 3)))
        content = wrong if turns else f"{ask}\n\n{wrong}"
        turns += chat(draw, content) if not turns else [{"role": "user", "content": content}]
        left -= 2 * len(right)
        if left < 0:
            break
        turns.append({"role": "assistant", "content": right})
    if turns[-1]["role"] == "assistant":
        turns.pop()
    return Made(messages=tuple(turns), reference=right, max_new_tokens=96)


KINDS = [
    Kind(name="correction", weight=2, local=False, make=correction),
    Kind(name="rules_first", weight=2, local=False, make=rules_first),
    Kind(name="new_document", weight=2.5, local=True, make=new_document),
    Kind(name="proofread", weight=2.5, local=True, make=proofread),
    Kind(name="proofread_chat", weight=2.5, local=True, make=proofread_chat),
]
