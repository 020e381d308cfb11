"""Retrieval: facts planted in real text, and questions only the whole text can answer."""

from dataclasses import dataclass

from training.data import words
from training.data.sample import Request, Sample, TaskFamily

_QUESTION_TOKENS = 160
"""Room left for the question, the chat wrapper and the answer."""
_FACT_TOKENS = 24


@dataclass(frozen=True, slots=True)
class _Fact:
    statement: str
    questions: list[str]
    held_out_questions: list[str]
    prefix: str
    kind: str  # of value: "code", "animal", "name", "word" or "date"


_FACTS = [
    _Fact(
        "The access code of the {key} is {value}.",
        [
            "What is the access code of the {key}?",
            "Which access code belongs to the {key}? Answer with the code.",
            "Find the access code of the {key} in the text above.",
            "I lost the access code of the {key}. It is mentioned somewhere; what is it?",
            "{key}: access code?",
            "Can you tell me how I get into the {key}? I need its access code.",
        ],
        [
            "I need to get into the {key}. Which digits do I type?",
            "Somewhere above the access code of the {key} was given. Please tell me.",
        ],
        "The access code of the {key} is",
        "code",
    ),
    _Fact(
        "One of the special magic numbers for the {key} is: {value}.",
        [
            "What is the special magic number for the {key} mentioned in the text?",
            "Give me the magic number for the {key}.",
            "Look through the text above: which magic number is stated for the {key}?",
            "There is a special magic number for the {key}. Please tell me which.",
            "Extract the magic number of the {key}.",
        ],
        [
            "The {key} has a magic number. Quote it.",
            "State the number the document calls magic for the {key}.",
        ],
        "The special magic number for the {key} is:",
        "code",
    ),
    _Fact(
        "Note that invoice {value} was sent to the {key}.",
        [
            "Which invoice was sent to the {key}?",
            "What is the number of the invoice that was sent to the {key}?",
            "Please look up the invoice for the {key} and give me its number.",
            "Do you see an invoice to the {key}? Tell me the number only.",
        ],
        ["An invoice went out to the {key}. What is its number?"],
        "The invoice sent to the {key} has the number",
        "code",
    ),
    _Fact(
        "The animal that guards the {key} is the {value}.",
        [
            "Which animal guards the {key}?",
            "According to the text, what animal is the guard of the {key}?",
            "Name the animal that stands guard at the {key}.",
            "The {key} is guarded by an animal. Can you find out which one it is?",
        ],
        ["Who keeps watch over the {key}? Name the animal."],
        "The animal that guards the {key} is the",
        "animal",
    ),
    _Fact(
        "The keeper of the {key} is called {value}.",
        [
            "Who is the keeper of the {key}?",
            "What is the name of the keeper of the {key}? Search the text above.",
            "Please give me the full name of the keeper of the {key}.",
            "I would like to write to the keeper of the {key}. What is the name?",
        ],
        ["Somebody keeps the {key}. What are they called?"],
        "The keeper of the {key} is called",
        "name",
    ),
    _Fact(
        "The password for the {key} is {value}.",
        [
            "What is the password for the {key}?",
            "Tell me the password that opens the {key}.",
            "Somebody asks for the password of the {key}. What should I answer?",
            "Quote the password for the {key} from the document.",
        ],
        ["Remind me of the secret word that lets one into the {key}."],
        "The password for the {key} is",
        "word",
    ),
    _Fact(
        "Remember: the meeting at the {key} begins on {value}.",
        [
            "When does the meeting at the {key} begin?",
            "On which day does the meeting at the {key} begin?",
            "I want to attend the meeting at the {key}. What date is it?",
        ],
        ["People will gather at the {key}. On what date?"],
        "The meeting at the {key} begins on",
        "date",
    ),
    _Fact(
        "The telephone number of the {key} is {value}.",
        [
            "What is the telephone number of the {key}?",
            "How can I reach the {key} by telephone?",
            "Give me the number I have to dial for the {key}.",
        ],
        ["I want to call the {key}. Which number is it?"],
        "The telephone number of the {key} is",
        "code",
    ),
]


def _value(request: Request, kind: str) -> str:
    rng = request.rng
    if kind == "animal":
        return f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.ANIMALS)}"
    if kind == "name":
        return f"{rng.choice(words.NAMES)} {rng.choice(words.PLACES).title()}"
    if kind == "word":
        return rng.choice(words.CODE_NAMES).upper()
    if kind == "date":
        return f"{rng.choice(words.MONTHS)} {rng.randint(1, 28)}"
    return words.digits(rng)


def plant(request: Request, statements: list[str], reserved_tokens: int) -> str:
    """Spread statements over real text at paragraph boundaries, in their order."""
    rng = request.rng
    filler = request.text.run(rng, request.tokens - reserved_tokens)
    places = sorted(rng.randrange(len(filler) + 1) for _ in statements)
    for shift, (at, statement) in enumerate(zip(places, statements, strict=True)):
        filler.insert(at + shift, statement)
    return "\n\n".join(filler)


def _retrieve(request: Request, task: str, facts: int) -> Sample:
    rng = request.rng
    fact = rng.choice(_FACTS)
    keys = words.distinct_places(rng, facts)
    values = [_value(request, fact.kind) for _ in keys]
    statements = [
        fact.statement.format(key=key, value=value) for key, value in zip(keys, values, strict=True)
    ]
    asked = rng.randrange(facts)
    context = plant(request, statements, _QUESTION_TOKENS + _FACT_TOKENS * facts)
    question = request.wording(fact.questions, fact.held_out_questions)
    return Sample(
        task=task,
        context=context,
        question=question.format(key=keys[asked]),
        answer_prefix=fact.prefix.format(key=keys[asked]),
        answer=f" {values[asked]}.",
        instruction_first=rng.random() < 0.25,
        details={"facts": facts},
    )


def make_needle(request: Request) -> Sample:
    """Plant one fact and ask for it."""
    return _retrieve(request, "needle", 1)


def make_multi_key(request: Request) -> Sample:
    """Plant several facts of a kind and ask for one."""
    return _retrieve(request, "multi_key", request.rng.randint(3, 6))


def make_variable_tracking(request: Request) -> Sample:
    """Plant assignments that name each other; ask for the value at a chain's end."""
    rng = request.rng
    names = rng.sample(words.CODE_NAMES, 6)
    hops = rng.randint(1, 2)
    chain, others = names[: hops + 1], names[hops + 1 :]
    value = words.digits(rng)
    statements = [f"Variable {chain[0]} is set to {value}."]
    statements += [
        f"Variable {later} is set to the value of {earlier}, which is {value}."
        for earlier, later in zip(chain, chain[1:], strict=False)
    ]
    for other in others[:2]:
        at = rng.randrange(len(statements) + 1)
        statements.insert(at, f"Variable {other} is set to {words.digits(rng)}.")
    question = request.wording(
        [
            "Which value does the variable {name} hold at the end?",
            "Follow the assignments in the text. What is the value of variable {name}?",
            "What number is stored in {name}?",
            "Work out what {name} is set to, and give the number.",
            "{name} = ?",
        ],
        ["After all assignments above, {name} contains a number. Which one?"],
    )
    return Sample(
        task="variable_tracking",
        context=plant(request, statements, _QUESTION_TOKENS + _FACT_TOKENS * len(statements)),
        question=question.format(name=chain[-1]),
        answer_prefix=f"Variable {chain[-1]} is set to",
        answer=f" {value}.",
        instruction_first=rng.random() < 0.25,
        details={"hops": hops},
    )


FAMILIES = [
    TaskFamily(
        name="needle", group="retrieval", metric="exact", target_share=0.6, make=make_needle
    ),
    TaskFamily(
        name="multi_key", group="retrieval", metric="exact", target_share=0.6, make=make_multi_key
    ),
    TaskFamily(
        name="variable_tracking",
        group="retrieval",
        metric="exact",
        target_share=0.6,
        make=make_variable_tracking,
    ),
]
