"""Facts hidden in long documentation, and questions about them: worded here, for evaluation alone.

The hay is the documentation of Python's language that its standard library carries (`pydoc`'s
topics), so a prompt depends on the Python version; `python -m benchmarks.real_tasks needles`
writes a file that does not.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.real_tasks.samples import Sample

CHARACTERS_A_TOKEN: Final = 4.4
"""Of this hay, a little below the 4.55 of Qwen2.5's tokenizer."""
DEPTHS: Final = (0.05, 0.25, 0.45, 0.65, 0.85)
"""Of a single fact, as shares of the text before it."""
FACTS_OF_A_LIST: Final = 3


@dataclass(frozen=True, slots=True)
class Wording:
    """How a fact is told and asked for."""

    fact: str
    question: str
    """With `{key}` where facts of the same wording are told apart."""
    keys: tuple[str, ...]


VALUES: Final = (
    Wording(
        "By the way, whoever opens locker {key} at the old swimming hall needs the code {value}.",
        "Which code opens locker {key} at the old swimming hall?",
        ("B7", "K12", "D3", "R9"),
    ),
    Wording(
        "The lighthouse keeper of {key} counted exactly {value} passing ships last year.",
        "How many passing ships did the lighthouse keeper of {key} count last year?",
        ("Skarholm", "Port Ellery", "Cape Doran", "Vestness"),
    ),
    Wording(
        "Margin note: in the inventory of {key}'s workshop, the brass gauge has number {value}.",
        "What number has the brass gauge in the inventory of {key}'s workshop?",
        ("Ottoline", "Barnaby", "Perpetua", "Leopold"),
    ),
    Wording(
        "Flight {key} was rebooked under the reference {value}, as the clerk wrote on the ticket.",
        "Under which reference was flight {key} rebooked?",
        ("QN 418", "VX 73", "LT 2206", "HB 951"),
    ),
    Wording(
        "It took {value} bricks to rebuild the chimney of the {key} bakery after the storm.",
        "How many bricks did it take to rebuild the chimney of the {key} bakery?",
        ("Marlow Street", "Quayside", "North Gate", "Abbey Lane"),
    ),
    Wording(
        "The seismograph in {key} was calibrated with the constant {value} that spring.",
        "With which constant was the seismograph in {key} calibrated?",
        ("Trelleck", "Monteverna", "Oshima", "Ruapuke"),
    ),
)
"""Facts whose value is a number of five digits."""

PHRASES: Final = (
    Wording(
        "The password that lets guests into the {key} garden party is '{value}'.",
        "What is the password that lets guests into the {key} garden party?",
        ("Wetherby", "Lindqvist", "Amaral", "Okonkwo"),
    ),
    Wording(
        "For the {key} regatta, the committee named its boat '{value}' by a narrow vote.",
        "Which name did the committee give its boat for the {key} regatta?",
        ("Easter", "harvest", "midsummer", "jubilee"),
    ),
    Wording(
        "According to the chart on the wall, the {key} ward's tea blend is called '{value}'.",
        "What is the {key} ward's tea blend called?",
        ("children's", "eastern", "night", "maternity"),
    ),
    Wording(
        "The motto carved above the door of {key} House reads '{value}'.",
        "What does the motto carved above the door of {key} House read?",
        ("Hawthorn", "Gable", "Merrion", "Sable"),
    ),
    Wording(
        "A parrot in the {key} tavern has been taught to say nothing but '{value}'.",
        "What is the only thing that the parrot in the {key} tavern says?",
        ("Anchor", "Three Bells", "Crooked Mast", "Salt Cellar"),
    ),
    Wording(
        "In {key}'s will, the painting in the hall is listed under the title '{value}'.",
        "Under which title is the painting in the hall listed in {key}'s will?",
        ("Aunt Philippa", "Captain Reyes", "Doctor Nwosu", "Madame Vautrin"),
    ),
)
"""Facts whose value is a phrase of two words."""

_FIRST_WORDS: Final = (
    *("amber", "crimson", "drowsy", "frozen", "gentle", "hollow", "ivory", "jagged", "lonely"),
    *("marble", "nimble", "opal", "patient", "quiet", "rusty", "silver", "tangled", "velvet"),
)
_SECOND_WORDS: Final = (
    *("anvil", "badger", "compass", "dune", "ember", "falcon", "glacier", "harbour", "juniper"),
    *(
        "kettle",
        "lantern",
        "meadow",
        "orchard",
        "pelican",
        "quarry",
        "sparrow",
        "thimble",
        "willow",
    ),
)
_INTRODUCTION: Final = (
    "Below is a long text. Somewhere in it stands something that does not belong to it, and you "
    "will be asked about that.\n\n"
)


def hay() -> str:
    """Return the text in which facts are hidden."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def make_needles(count: int, least_tokens: int, most_tokens: int, seed: int = 0) -> list[Sample]:
    """Make prompts of evenly spread length: of five, two hide a number, one a phrase, two a list.

    Args:
        count: prompts.
        least_tokens: of the shortest prompt, roughly.
        most_tokens: of the longest prompt, at most, by `CHARACTERS_A_TOKEN`.
        seed: of texts, values and keys.

    Returns: samples, whose answers all count.
    """
    text, found = hay(), []
    for number in range(count):
        rng = random.Random(f"needles/{seed}/{number}")
        share = number / max(1, count - 1)
        tokens = least_tokens + share * (most_tokens - least_tokens)
        kind = ("value", "values", "phrase", "value", "values")[number % 5]
        found.append(_sample(number, kind, text, round(tokens * CHARACTERS_A_TOKEN), rng))
    return found


def _sample(number: int, kind: str, text: str, characters: int, rng: random.Random) -> Sample:
    wordings = PHRASES if kind == "phrase" else VALUES
    wording = wordings[number // 5 % len(wordings)]
    count = FACTS_OF_A_LIST if kind == "values" else 1
    keys = rng.sample(wording.keys, count)
    values = [_phrase(rng) if kind == "phrase" else str(rng.randrange(10000, 100000)) for _ in keys]
    facts = [
        wording.fact.format(key=key, value=value) for key, value in zip(keys, values, strict=True)
    ]
    if count == 1:
        depths = [DEPTHS[number // 2 % len(DEPTHS)]]
        question = wording.question.format(key=keys[0])
    else:
        depths = sorted(rng.uniform(0.03, 0.95) for _ in facts)
        question = "Answer in one line, separated by commas. " + " ".join(
            wording.question.format(key=key) for key in keys
        )
    ending = f"\n\nNow answer from the text above, with the answer alone.\nQuestion: {question}"
    length = characters - len(_INTRODUCTION) - len(ending) - sum(map(len, facts))
    begin = rng.randrange(max(1, len(text) - length))
    prompt = _INTRODUCTION + _hide(text[begin : begin + length], facts, depths) + ending
    return Sample(
        task=f"hidden_{kind}",
        id=f"hidden_{kind}-{number}",
        prompt=prompt,
        answers=tuple(values),
        max_new_tokens=32 if count == 1 else 64,
    )


def _phrase(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST_WORDS)} {rng.choice(_SECOND_WORDS)}"


def _hide(text: str, facts: Sequence[str], depths: Sequence[float]) -> str:
    """Put facts between the text's lines, at these shares of it."""
    parts, at = [], 0
    for fact, depth in zip(facts, depths, strict=True):
        end = text.find("\n", int(depth * len(text)))
        end = len(text) if end < 0 else end
        parts += [text[at:end], "\n", fact]
        at = end
    return "".join([*parts, text[at:]])
