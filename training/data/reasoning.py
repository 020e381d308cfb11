"""Short prompts whose answers are long: tracking a state, chains of sums."""

from training.data import words
from training.data.sample import Request, Sample, TaskFamily

_TOKENS_A_STEP = 14


def make_state_tracking(request: Request) -> Sample:
    """Move an object between rooms by a rule; write its place after every step."""
    rng = request.rng
    rooms = rng.sample(words.PLACES, 4)
    owner, thing = rng.choice(words.NAMES), rng.choice(words.ANIMALS)
    steps = max(4, request.tokens // _TOKENS_A_STEP)
    rule = ", then the ".join(rooms)
    question = request.wording(
        ["{owner}'s {thing} goes round: first the {rule}. Where is it at each of {steps} steps?"],
        ["A {thing} of {owner} visits in turn the {rule}. Log its place at {steps} steps."],
    )
    lines = [f"Step {at + 1}: the {rooms[at % len(rooms)]}" for at in range(steps)]
    return Sample(
        task="state_tracking",
        context="",
        question=question.format(owner=owner, thing=thing, rule=rule, steps=steps),
        answer_prefix=lines[0],
        answer="\n" + "\n".join(lines[1:]),
        details={"steps": steps},
    )


def make_arithmetic(request: Request) -> Sample:
    """Add and subtract by a repeating rule; write every sum."""
    rng = request.rng
    value = rng.randrange(100, 1000)
    moves = [rng.choice([1, -1]) * rng.randrange(2, 30) for _ in range(3)]
    steps = max(4, request.tokens // _TOKENS_A_STEP)
    rule = ", ".join(f"{'add' if move > 0 else 'subtract'} {abs(move)}" for move in moves)
    question = request.wording(
        ["Start with {value} and repeat {steps} times in turn: {rule}. Write every result."],
        ["Begin at {value}. Apply in a circle: {rule}. Show each of {steps} steps."],
    )
    lines, current = [], value
    for at in range(steps):
        move = moves[at % 3]
        lines.append(f"{current} {'+' if move > 0 else '-'} {abs(move)} = {current + move}")
        current += move
    return Sample(
        task="arithmetic",
        context="",
        question=question.format(value=value, steps=steps, rule=rule),
        answer_prefix=lines[0],
        answer="\n" + "\n".join(lines[1:]),
        details={"steps": steps},
    )


FAMILIES = [
    TaskFamily(
        name=name,
        group="reasoning",
        metric="tokens",
        target_share=0.8,
        make=make,
        short_prompt=True,
    )
    for name, make in (("state_tracking", make_state_tracking), ("arithmetic", make_arithmetic))
]
