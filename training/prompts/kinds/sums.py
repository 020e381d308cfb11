"""Word problems with their solutions, made up: few-shot and alone."""

import operator
import random
from dataclasses import dataclass

from training.prompts.kinds.drawing import Draw, Kind, Made, finish
from training.prompts.wordings_file import choose, phrases


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and its solution."""

    question: str
    steps: str
    result: int


_FORMS = (
    ("n0 * n1", "r0 - n2"),
    ("n0 + n1", "r0 * n2"),
    ("n1 * n2", "n0 + r0"),
    ("n0 * n1", "r0 - n2", "r1 + n3"),
    ("n0 + n1", "r0 + n2", "r1 * n3"),
    ("n0 * n1", "n2 * n3", "r0 + r1"),
)
"""Steps of each form of problem, in the order of `sums` in phrases.json: n0 to n3 are the problem's
numbers, r0 and r1 results of earlier steps."""
_SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def make_problem(rng: random.Random, language: str) -> Problem:
    """Make up a problem of two or three steps, whose numbers suit it."""
    form = rng.randrange(len(_FORMS))
    numbers = (rng.randint(6, 60), rng.randint(2, 25), rng.randint(2, 12), rng.randint(2, 12))
    template = rng.choice(phrases("sums", language)[form])
    names = rng.sample(phrases("sum_names", language), 2)
    question = template.format(a=names[0], b=names[1], n=numbers)
    values = {f"n{at}": number for at, number in enumerate(numbers)}
    steps = []
    for at, step in enumerate(_FORMS[form]):
        left, sign, right = step.split()
        values[f"r{at}"] = _SIGNS[sign](values[left], values[right])
        steps.append(f"{values[left]} {sign} {values[right]} = {values[f'r{at}']}")
    return Problem(question, "; ".join(steps), values[f"r{len(steps) - 1}"])


def _solved(problem: Problem, form: str) -> str:
    return form.format(question=problem.question, steps=problem.steps, result=problem.result)


def solved_shots(draw: Draw) -> Made | None:
    """Solved word problems, and one to solve."""
    rng, language = draw.rng, draw.language
    form = rng.choice(phrases("sum_forms", language))
    tokens = min(draw.tokens, 6000) if rng.random() < 0.7 else draw.tokens
    chars = tokens * (2.4 if language == "en" else 1.3)
    shown: list[str] = []
    while chars > 0:
        shown.append(_solved(make_problem(rng, language), form))
        chars -= len(shown[-1])
    last = make_problem(rng, language)
    open_form = form.split("{steps}")[0]
    text = "\n\n".join([*shown, open_form.format(question=last.question).rstrip()])
    head = choose(rng, "solved_shots", language).ask if rng.random() < 0.5 else ""
    text = f"{head}\n\n{text}" if head else text
    return finish(draw, text, reference=str(last.result), max_new_tokens=128, raw_share=0.4)


def short_request(draw: Draw) -> Made | None:
    """A request that stands alone: an everyday one or a word problem, without a long context."""
    rng = draw.rng
    if rng.random() < 0.45:
        text = choose(rng, "everyday", draw.language).ask
        return finish(draw, text, max_new_tokens=160, raw_share=0.05)
    problem = make_problem(rng, draw.language)
    wording = choose(rng, "solve", draw.language)
    text = wording.ask.replace("{question}", problem.question)
    return finish(draw, text, reference=str(problem.result), max_new_tokens=256, raw_share=0.05)


KINDS = [
    Kind(name="solved_shots", weight=2, local=True, make=solved_shots),
    Kind(name="short_request", weight=3, local=True, make=short_request),
]
