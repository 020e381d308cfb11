"""Kinds on what people look things up in: a glossary, instructions, a tree of files."""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import PurePosixPath

from training.prompts.kinds.drawing import Draw, Kind, Made
from training.prompts.kinds.entries import MOST_COUNTED, Ask, asked, at_most_one, grow, once
from training.prompts.kinds.pieces import code_title, identifiers, sentence, title, titled
from training.prompts.kinds.sentences import sentences_of, squeezed

_ENTRY = re.compile(
    r"\n\n(?P<term>[A-Za-z][^\n:{}<>]{1,38})\n\n {3}(?P<words>\S[^\n]+(?:\n {3}[^\n]+)*)"
)
_SUFFIXES = ("odt", "md", "pdf", "txt", "docx")
_LOOKED_UP = ("help", "manual", "book")
_DO = {
    "en": re.compile(
        r"(?:Choose|Click|Select|Open|Enter|Press|Drag|Set|Go|Type|Right-click|Create|Use|Add|Make"
        r"|Install|Run|Check|Remove|Move|Copy|Start|Change|Insert|Double-click)\b"
    ),
    "zh": re.compile(
        r"选择|点击|单击|双击|打开|输入|按下?|拖动|设置|添加|创建|运行|安装|插入|关闭"
    ),
}


def _dictionary_entry(draw: Draw) -> tuple[str, str] | None:
    """Take an entry out of a dictionary, if the library has one in the drawn language."""
    group = f"{draw.language}/dictionary"
    if not draw.library.indices(group):
        return None
    text = draw.library.texts[draw.library.draw_index(draw.rng, group)].text
    entry = _ENTRY.search(text, draw.rng.randrange(len(text)))
    if not entry:
        return None
    words = re.sub(r"<[^>]*>|[{}]", "", entry["words"])
    return entry["term"].strip(), " ".join(words.split())[:400]


def _page_entry(draw: Draw) -> tuple[str, str] | None:
    """Take the title of a page and how it begins."""
    found = titled(draw, registers=_LOOKED_UP)
    own = sentences_of(draw.library.texts[found[1]].text, draw.language)[:2] if found else []
    return (found[0], " ".join(own[: draw.rng.randint(1, 2)])) if found and own else None


def glossary(draw: Draw) -> Made | None:
    """A glossary: what a term means, which term is meant, what stands next to it."""
    rng = draw.rng
    form = rng.choice(("{t}: {w}", "**{t}**\n{w}", "{t}\n    {w}", "- {t} = {w}"))
    look = rng.choice((_dictionary_entry, _page_entry))
    terms: set[str] = set()

    def make() -> tuple[str, str]:
        for _ in range(12):
            entry = look(draw) or _page_entry(draw)
            if entry and entry[0] not in terms:
                break
        else:
            words = sentence(draw, 200)
            entry = (words[: len(words) // 3].strip(), words)
        terms.add(entry[0])
        return entry

    def write(entry: tuple[str, str]) -> str:
        return form.replace("{t}", entry[0]).replace("{w}", entry[1])

    entries = once(grow(draw, make, write), lambda entry: entry[0])
    if len(entries) < 2:
        return None
    if rng.random() < 0.7:
        entries.sort(key=lambda entry: entry[0].lower())
    (term, words), (after, _) = rng.choice(list(pairwise(entries)))
    fields = {"name": term, "quote": words[: 90 if draw.language == "en" else 36].strip()}
    asks = [
        Ask(wording="glossary/define", fields=fields, reference=words, max_new_tokens=120),
        Ask(wording="glossary/plain", fields=fields, max_new_tokens=120),
        Ask(wording="glossary/next", fields=fields, reference=after),
    ]
    if sum(other[1].startswith(fields["quote"]) for other in entries) == 1:
        asks.append(Ask(wording="glossary/which", fields=fields, reference=term))
    return asked(draw, list(map(write, entries)), asks)


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be done, and how."""

    title: str
    steps: list[str]


def _steps(text: str, language: str) -> list[str]:
    """List the short paragraphs that tell what to do."""
    paragraphs = map(squeezed, text.split("\n\n"))
    return [
        words
        for words in paragraphs
        if _DO[language].match(words) and len(words) <= 200 and words[-1] in ".。"
    ]


def _task(draw: Draw) -> Task:
    """Take instructions from a page that has some; else any sentences that follow each other."""
    for tries in range(16):
        found = titled(draw, registers=_LOOKED_UP)
        if not found:
            continue
        text = draw.library.texts[found[1]].text
        steps = _steps(text, draw.language) if tries < 12 else sentences_of(text, draw.language)
        steps = list(dict.fromkeys(steps))
        if len(steps) >= 3:
            start = draw.rng.randrange(len(steps) - 2)
            return Task(found[0], steps[start : start + draw.rng.randint(3, 9)])
    return Task(title(draw), [sentence(draw) for _ in range(draw.rng.randint(3, 8))])


def instructions(draw: Draw) -> Made | None:
    """Instructions in numbered steps: what comes after one, which is the nth, how many."""
    rng, zh = draw.rng, draw.language == "zh"
    mark = rng.choice(("第{n}步：", "{n}. ", "（{n}）") if zh else ("Step {n}: ", "{n}. ", "{n}) "))

    def write(task: Task) -> str:
        steps = [f"{mark.replace('{n}', str(at))}{step}" for at, step in enumerate(task.steps, 1)]
        return "\n".join([task.title, *steps])

    tasks = grow(draw, lambda: _task(draw), write)
    alone = [task for task in once(tasks, lambda task: task.title) if len(task.steps) > 1]
    if not alone:
        return None
    task = rng.choice(alone)
    at = rng.randrange(len(task.steps) - 1)
    fields = {"name": task.title, "n": str(at + 1), "quote": task.steps[at]}
    asks = [
        Ask(wording="instructions/nth", fields=fields, reference=task.steps[at]),
        Ask(wording="instructions/count", fields=fields, reference=str(len(task.steps))),
        Ask(wording="instructions/after", fields=fields, reference=task.steps[at + 1]),
    ]
    if sum(task.steps[at] in other.steps for other in tasks) == 1:
        asks.append(Ask(wording="instructions/task", fields=fields, reference=task.title))
    return asked(draw, list(map(write, tasks)), asks)


def _paths(draw: Draw) -> list[PurePosixPath]:
    """Make paths of some works: of code, or of documents by their titles."""
    rng, library = draw.rng, draw.library
    names = identifiers(draw)
    group = "code" if draw.language == "en" and rng.random() < 0.7 else draw.language
    works = [
        library.indices(f"source/{library.texts[library.draw_index(rng, group)].source}")
        for _ in range(2 + draw.tokens // 1000)
    ]
    taken: set[PurePosixPath] = set()

    def make() -> PurePosixPath:
        text = library.texts[rng.choice(rng.choice(works))]
        if text.is_code:
            path = PurePosixPath(code_title(text))
        else:
            found = titled(draw)
            name = f"{found[0] if found else next(names)}.{rng.choice(_SUFFIXES)}"
            path = PurePosixPath(text.register, text.source, name)
        if path in taken:
            path = path.with_name(next(names) + path.suffix)
        taken.add(path)
        return path

    # Folders and rules are tokens too.
    return sorted(grow(draw, make, lambda path: f"{path} 12345 {'|-' * len(path.parts)}"))


def _written_tree(paths: list[PurePosixPath], sizes: dict[PurePosixPath, int]) -> list[str]:
    """Write a tree by indentation."""
    lines: list[str] = []
    open_folders: tuple[str, ...] = ()
    for path in paths:
        folders = path.parts[:-1]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(folders, open_folders, strict=False))
        shared = sum(1 for _ in same)
        lines += [f"{'│   ' * depth}├── {folders[depth]}/" for depth in range(shared, len(folders))]
        lines.append(f"{'│   ' * len(folders)}├── {path.name} ({sizes[path]})")
        open_folders = folders
    return lines


def file_tree(draw: Draw) -> Made | None:
    """A tree of files: where one lies, what a folder holds, which of its files is the largest."""
    rng = draw.rng
    paths = _paths(draw)
    sizes = {path: rng.randint(90, 99999) for path in paths}
    style = rng.choice(("tree", "find", "list"))
    if style == "tree":
        lines = _written_tree(paths, sizes)
    elif style == "find":
        lines = [f"./{path} {sizes[path]}" for path in paths]
    else:
        lines = [f"-rw-r--r-- {sizes[path]:>8} {path}" for path in paths]
    folders = defaultdict(list)
    for path in paths:
        folders[path.parent].append(path)
    asks = []
    for path in at_most_one(draw, paths, lambda path: path.name):
        fields = {"name": path.name}
        asks.append(Ask(wording="file_tree/where", fields=fields, reference=str(path)))
        asks.append(Ask(wording="file_tree/size", fields=fields, reference=str(sizes[path])))
    few = [folder for folder in folders if 2 <= len(folders[folder]) <= MOST_COUNTED]
    if few:
        folder = rng.choice(few)
        own = folders[folder]
        fields = {"path": str(folder)}
        listed, most = ", ".join(path.name for path in own), max(own, key=lambda path: sizes[path])
        asks += [
            Ask(wording="file_tree/list", fields=fields, reference=listed, max_new_tokens=120),
            Ask(wording="file_tree/count", fields=fields, reference=str(len(own))),
            Ask(wording="file_tree/largest", fields=fields, reference=most.name),
        ]
    return asked(draw, ["\n".join(lines)], asks, fence="")


KINDS = [
    Kind(name="glossary", weight=2, local=False, make=glossary),
    Kind(name="instructions", weight=2, local=False, make=instructions),
    Kind(name="file_tree", weight=2, local=False, make=file_tree),
]
