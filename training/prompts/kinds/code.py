"""Kinds on code: completion across files of a repository and within one, questions on code."""

from collections.abc import Callable
from pathlib import PurePosixPath

from training.prompts.kinds.drawing import Draw, Kind, Made, fill, finish, longest_of
from training.prompts.texts import Text
from training.prompts.wordings_file import choose

_NAMES = {
    "py": "Python", "java": "Java", "js": "JavaScript", "go": "Go", "c": "C", "h": "C",
    "kt": "Kotlin", "cpp": "C++", "mm": "Objective-C++", "pm": "Perl",
}  # fmt: skip


def _comment(language: str, words: str) -> str:
    return f"# {words}" if language in ("py", "pm") else f"// {words}"


def _begun(draw: Draw, text: Text, tokens: int) -> tuple[str, str]:
    """Cut a file before some line of code.

    Returns: at most so many tokens up to there; the line that comes next.
    """
    lines = text.text.split("\n")
    real = [at for at in range(min(8, len(lines) // 2), len(lines)) if len(lines[at].strip()) > 8]
    if not real:
        return text.text, ""
    # Long contexts want places late in the file.
    late = real[len(real) // 3 :] or real
    at = draw.rng.choice(late)
    shown = "\n".join(lines[:at])
    most = draw.library.chars(text, tokens)
    if len(shown) > most:
        cut = shown.find("\n", len(shown) - most)
        shown = shown[cut + 1 :]
    return shown + "\n", lines[at]


def file_completion(draw: Draw) -> Made | None:
    """Go on with one file of code, as it is or asked for."""
    index = longest_of(draw, "code", tries=8 if draw.tokens > 6000 else 2)
    text = draw.library.texts[index]
    shown, following = _begun(draw, text, draw.tokens)
    if not following:
        return None
    return _asked(draw, "file_completion", text, shown, following, raw_share=0.5)


def _asked(draw: Draw, kind: str, text: Text, shown: str, following: str, raw_share: float) -> Made:
    """Give code as it is, or under one of the ways to ask for its next line."""
    if draw.rng.random() < raw_share:
        return Made(prompt=shown, reference=following, max_new_tokens=64)
    wording = choose(draw.rng, kind, "en")
    fields = {"language": _NAMES.get(text.language, text.language)}
    ask, lead = fill(wording.ask, fields), fill(wording.lead, fields)
    content = "\n".join(part for part in (lead, shown.rstrip("\n") if ask else shown, ask) if part)
    return finish(draw, content, reference=following, raw_share=0.3)


def repository_completion(draw: Draw) -> Made | None:
    """Other files of the same package, then a file to go on with."""
    rng, library = draw.rng, draw.library
    index = library.draw_index(rng, "code")
    text = library.texts[index]
    own = int(draw.tokens * rng.uniform(0.15, 0.5))
    shown, following = _begun(draw, text, own)
    if not following:
        return None
    others = [
        at
        for at in library.indices(f"source/{text.source}")
        if at != index and library.texts[at].language == text.language
    ]
    folder = PurePosixPath(text.title).parent
    others.sort(
        key=lambda at: (PurePosixPath(library.texts[at].title).parent != folder, rng.random())
    )
    left = library.chars(text, draw.tokens) - len(shown)
    style = _file_head(draw)
    pieces: list[str] = []
    for at in others[:40]:
        if left < 300:
            break
        other = library.texts[at]
        piece = other.text if len(other.text) <= left else library.run(rng, at, int(left / 4))
        pieces.append(style(other) + piece)
        left -= len(pieces[-1])
    rng.shuffle(pieces)
    body = "\n\n".join([*pieces, style(text) + shown])
    return _asked(draw, "repository_completion", text, body, following, raw_share=0.45)


def _file_head(draw: Draw) -> Callable[[Text], str]:
    style = draw.rng.choice(("comment", "path", "rule", "none"))
    if style == "comment":
        return lambda text: _comment(text.language, f"Path: {text.title}") + "\n"
    if style == "path":
        return lambda text: f"{text.title}\n"
    if style == "rule":
        return lambda text: f"=== {text.title} ===\n"
    return lambda text: ""


def code_question(draw: Draw) -> Made | None:
    """Explain, review or test the last function shown; or say what the whole is for."""
    index = longest_of(draw, "code", tries=3)
    run = draw.library.run(draw.rng, index, draw.tokens)
    text = draw.library.texts[index]
    wording = choose(draw.rng, "code_question", "en")
    fields = {"language": _NAMES.get(text.language, text.language), "path": text.title}
    fence = f"```{text.language}\n{run}\n```" if draw.rng.random() < 0.5 else run
    parts = (fill(wording.lead, fields), fence, fill(wording.ask, fields))
    content = "\n\n".join(part for part in parts if part)
    return finish(draw, content, max_new_tokens=160, raw_share=0.05)


def code_edit(draw: Draw) -> Made | None:
    """Much code, then a short piece again with something to do to it."""
    rng, library = draw.rng, draw.library
    index = longest_of(draw, "code", tries=3)
    run = library.run(rng, index, draw.tokens)
    lines = library.run(rng, library.draw_index(rng, "code"), 160)
    wording = choose(rng, "code_edit", "en")
    ask = fill(wording.ask, {"piece": lines, "tag": library.texts[index].language})
    return finish(draw, f"{run}\n\n{ask}", max_new_tokens=200, raw_share=0.05)


KINDS = [
    Kind(name="file_completion", weight=8, local=True, make=file_completion, languages=("en",)),
    Kind(
        name="repository_completion",
        weight=7,
        local=False,
        make=repository_completion,
        languages=("en",),
    ),
    Kind(name="code_question", weight=2, local=False, make=code_question, languages=("en",)),
    Kind(name="code_edit", weight=3, local=True, make=code_edit, languages=("en",)),
]
