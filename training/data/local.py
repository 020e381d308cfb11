"""Local tasks: what they ask for stands in, or follows from, the end of the prompt."""

import dataclasses
import re

from training.data import words
from training.data.sample import Request, Sample, TaskFamily

_QUESTION_TOKENS = 160
_ANSWER_WORDS = 48


def _sentences(text: str) -> list[str]:
    flat = " ".join(text.split())
    return [piece for piece in re.split(r"(?<=[.!?]) +", flat) if 4 <= len(piece.split()) <= 40]


def make_repeat_end(request: Request) -> Sample:
    """Ask for the last words, the last sentence or the last line of the text."""
    rng = request.rng
    filler = request.text.run(rng, request.tokens - _QUESTION_TOKENS - 80)
    while len(filler) > 1 and not _sentences(filler[-1]):
        filler.pop()
    closing = _sentences(filler[-1]) or [" ".join(filler[-1].split()[-20:])]
    what = rng.choice(["words", "sentence", "line"])
    filler[-1] = " ".join(closing)
    if what == "words":
        count = rng.choice([8, 10, 12, 16])
        answer = " ".join(filler[-1].split()[-count:])
        question = request.wording(
            [
                f"Repeat the last {count} words of the text above.",
                f"Write down the final {count} words of the text.",
                f"What are the last {count} words?",
                f"Please give me the {count} words at the very end, unchanged.",
            ],
            [f"How does the text end? Give exactly its last {count} words."],
        )
    else:
        answer = closing[-1]
        if what == "line":
            filler[-1] = "\n".join(closing)
        question = request.wording(
            [
                f"Repeat the last {what} of the text above.",
                f"Copy the final {what} of the text.",
                f"What does the last {what} say?",
                f"Read me the {what} at the very end.",
            ],
            [f"Quote the {what} with which the text stops."],
        )
    return Sample(
        task="repeat_end",
        context="\n\n".join(filler),
        question=question,
        answer_prefix=f"The last {'words are' if what == 'words' else what + ' is'}:",
        answer=f" {answer}",
        instruction_first=rng.random() < 0.25,
        details={"what": what},
    )


def make_list_end(request: Request) -> Sample:
    """End the text with short minutes, a numbered list; ask for one of its latest entries."""
    rng = request.rng
    filler = request.text.run(rng, request.tokens - _QUESTION_TOKENS - 140)
    names = rng.sample(words.NAMES, 8)
    lines = [f"{at + 1}. {name}: the {words.place(rng)}" for at, name in enumerate(names)]
    asked = rng.randrange(3, 8)
    question = request.wording(
        [
            "In the list at the end, what stands beside {name}?",
            "Look at the final list. Which place goes with {name}?",
            "Give me the entry of {name} in the list that ends the text.",
            "What does the last list say about {name}?",
        ],
        ["The text closes with a list of people. Where does {name} belong?"],
    )
    return Sample(
        task="list_end",
        context="\n\n".join([*filler, "\n".join(lines)]),
        question=question.format(name=names[asked]),
        answer_prefix=f"{asked + 1}. {names[asked]}:",
        answer=f" {lines[asked].split(': ')[1]}",
        details={"asked": asked},
    )


def make_continue_text(request: Request) -> Sample:
    """Break real prose off inside a paragraph; the answer is how it goes on."""
    rng = request.rng
    filler = request.text.run(rng, request.tokens - _QUESTION_TOKENS)
    while len(filler) > 1 and len(filler[-1].split()) < 40:
        filler.pop()
    tail = filler[-1].split(" ")
    keep = max(len(tail) - _ANSWER_WORDS, len(tail) // 3)
    context = "\n\n".join([*filler[:-1], " ".join(tail[:keep])])
    question = request.wording(
        [
            "Continue the text above from where it stops.",
            "Write what comes next in the text above.",
            "Go on with the text from its last word.",
            "Please keep writing in the same style.",
            "How could the text go on?",
        ],
        ["The text breaks off. Carry on writing it."],
    )
    # The last words stand again in the answer's prefix, so that the model knows where to go on.
    return Sample(
        task="continue_text",
        context=context,
        question=question,
        answer_prefix=" ".join(tail[max(0, keep - 12) : keep]),
        answer=" " + " ".join(tail[keep : keep + _ANSWER_WORDS]),
        instruction_first=rng.random() < 0.25,
    )


def make_code_completion(request: Request) -> Sample:
    """Break real source code off at a line; the answer is the next lines."""
    rng = request.rng
    pieces = request.text.run(rng, request.tokens - _QUESTION_TOKENS, kind="code")
    lines = "\n".join(pieces).split("\n")
    keep = len(lines) - 3
    question = request.wording(
        [
            "Complete the code above: write the next lines.",
            "What are the next lines of this source code?",
            "Finish this code.",
            "Please continue the program where it was cut off.",
        ],
        ["Carry on programming from where this file was cut."],
    )
    return Sample(
        task="code_completion",
        context="```python\n" + "\n".join(lines[:keep]),
        question="```\n" + question,
        answer_prefix="```python\n" + "\n".join(lines[keep - 2 : keep]),
        answer="\n" + "\n".join(lines[keep:]),
    )


def ask_for_last_words(sample: Sample) -> Sample:
    """Ask a local question about another sample's context."""
    ending = " ".join(sample.context.split()[-10:])
    return dataclasses.replace(
        sample,
        question="Repeat the last 10 words of the text above.",
        answer_prefix="The last words are:",
        answer=f" {ending}",
    )


FAMILIES = [
    TaskFamily(
        name="repeat_end", group="local", metric="tokens", target_share=1.0, make=make_repeat_end
    ),
    TaskFamily(
        name="list_end", group="local", metric="exact", target_share=1.0, make=make_list_end
    ),
    TaskFamily(
        name="continue_text",
        group="local",
        metric="tokens",
        target_share=1.0,
        make=make_continue_text,
    ),
    TaskFamily(
        name="code_completion",
        group="local",
        metric="tokens",
        target_share=1.0,
        make=make_code_completion,
    ),
]
