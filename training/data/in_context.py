"""Tasks over the whole text at once: few-shot classification, the most common word."""

from training.data import words
from training.data.sample import Request, Sample, TaskFamily

_QUESTION_TOKENS = 160


def make_few_shot(request: Request) -> Sample:
    """Show snippets labelled by where they come from, under invented labels; ask for one more."""
    rng = request.rng
    sources = rng.sample(request.text.sources(), min(3, len(request.text.sources())))
    labels = dict(zip(sources, rng.sample(words.CODE_NAMES, len(sources)), strict=True))
    examples: list[str] = []
    left = request.tokens - _QUESTION_TOKENS - 80
    while left > 0:
        source = rng.choice(sources)
        snippet = " ".join(request.text.snippet(rng, source).split()[:30])
        left -= 2 * len(snippet.split()) + 12
        examples.append(f"Text: {snippet}\nLabel: {labels[source]}")
    source = rng.choice(sources)
    snippet = " ".join(request.text.snippet(rng, source).split()[:30])
    question = request.wording(
        [
            "Give the label of this text, as in the examples.\nText: {snippet}",
            "Classify this text like the examples above.\nText: {snippet}",
            "Which label does this one get?\nText: {snippet}",
        ],
        ["Decide as in the cases above which label fits here.\nText: {snippet}"],
    )
    return Sample(
        task="few_shot",
        context="\n\n".join(examples[:-1]),
        question=question.format(snippet=snippet),
        answer_prefix="Label:",
        answer=f" {labels[source]}",
        details={"labels": len(labels)},
    )


def make_common_words(request: Request) -> Sample:
    """List words of which one appears far more often than the others; ask for it."""
    rng = request.rng
    pool = [*words.PLACES, *words.ANIMALS, *words.ADJECTIVES]
    common, *rest = rng.sample(pool, 60)
    total = max(40, (request.tokens - _QUESTION_TOKENS) * 2 // 5)
    drawn = [common if rng.random() < 0.3 else rng.choice(rest) for _ in range(total)]
    question = request.wording(
        ["Which word appears most often in the list above?", "What is the most common word above?"],
        ["One word of the list keeps coming back. Which?"],
    )
    return Sample(
        task="common_words",
        context=", ".join(drawn),
        question=question,
        answer_prefix="The most common word is",
        answer=f" {common}.",
    )


FAMILIES = [
    TaskFamily(
        name="few_shot", group="in_context", metric="exact", target_share=1.0, make=make_few_shot
    ),
    TaskFamily(
        name="common_words",
        group="in_context",
        metric="exact",
        target_share=0.8,
        make=make_common_words,
    ),
]
