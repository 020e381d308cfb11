"""Kinds on parts of programs: tables of a database, a reference of functions, many files."""

import ast
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from training.prompts.kinds.drawing import Draw, Kind, Made
from training.prompts.kinds.entries import MOST_COUNTED, Ask, asked, estimate_tokens, grow, once
from training.prompts.kinds.pieces import code_title, identifiers, title
from training.prompts.texts import Text
from training.prompts.wordings_file import phrases

_DEFINED = re.compile(r"^[ \t]*(?:async )?def ([a-z]\w{3,})\(", re.M)
_TYPES = ("INTEGER", "TEXT", "DATE", "NUMERIC(10, 2)", "BOOLEAN", "TIMESTAMP", "VARCHAR(80)")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a database."""

    name: str
    note: str
    """May be empty."""
    columns: dict[str, str]
    """Types by names."""
    parent: str
    """The table that it refers to by `<parent>_id`, or nothing."""


def _tables(draw: Draw) -> tuple[list[Table], list[str]]:
    rng = draw.rng
    names, more = phrases("table_names", "en"), identifiers(draw)
    style, noted = rng.choice(("sql", "sql", "lines")), draw.language == "zh" or rng.random() < 0.3
    made: list[Table] = []
    taken: set[str] = set()

    def make() -> Table:
        name = rng.choice(names)
        while name in taken:
            name = f"{next(more).partition('_')[0]}_{rng.choice(names)}"
        taken.add(name)
        columns = dict(rng.sample(phrases("column_names", "en"), rng.randint(2, 6)))
        columns |= {next(more): rng.choice(_TYPES) for _ in range(rng.randint(0, 2))}
        parent = rng.choice(made).name if made and rng.random() < 0.8 else ""
        made.append(Table(name, f"-- {title(draw)}" if noted else "", columns, parent))
        return made[-1]

    def write(table: Table) -> str:
        refers = f"{table.parent}_id"
        if style == "lines":
            cells = ["id", *([f"{refers} -> {table.parent}.id"] if table.parent else [])]
            cells += [f"{name} {sort.lower()}" for name, sort in table.columns.items()]
            return f"{table.name}({', '.join(cells)}) {table.note}".rstrip()
        lines = ["id INTEGER PRIMARY KEY"]
        lines += [f"{name} {sort}" for name, sort in table.columns.items()]
        if table.parent:
            lines.insert(1, f"{refers} INTEGER NOT NULL REFERENCES {table.parent}(id)")
        inner = ",\n  ".join(lines)
        return f"{table.note}\nCREATE TABLE {table.name} (\n  {inner}\n);".lstrip()

    tables = grow(draw, make, write)
    return tables, [write(table) for table in tables]


def database_schema(draw: Draw) -> Made | None:
    """The tables of a database: a query over two of them, a table's columns, what refers to one."""
    rng = draw.rng
    tables, written = _tables(draw)
    by_name = {table.name: table for table in tables}
    child = rng.choice([table for table in tables if table.parent])
    parent = by_name[child.parent]
    key, other = rng.choice(list(child.columns)), rng.choice(list(parent.columns))
    query = (
        f"SELECT c.{key}, p.{other} FROM {child.name} c "
        f"JOIN {parent.name} p ON c.{parent.name}_id = p.id;"
    )
    fields = {"name": child.name, "place": parent.name, "key": key, "other": other}
    children = [table.name for table in tables if table.parent == parent.name]
    columns = ", ".join(child.columns)
    asks = [
        Ask(wording="database_schema/query", fields=fields, reference=query, max_new_tokens=120),
        Ask(wording="database_schema/change", fields=fields, max_new_tokens=120),
        Ask(wording="database_schema/columns", fields=fields, reference=columns, max_new_tokens=96),
    ]
    counts = Counter(key for table in tables for key in table.columns)
    alone = [(key, table) for table in tables for key in table.columns if counts[key] == 1]
    if alone:
        key, table = rng.choice(alone)
        asks.append(Ask(wording="database_schema/table", fields={"key": key}, reference=table.name))
    if len(children) <= MOST_COUNTED:
        listed = ", ".join(children)
        asks.append(
            Ask(
                wording="database_schema/refers", fields=fields, reference=listed, max_new_tokens=80
            )
        )
    return asked(draw, written, asks, fence="sql")


@dataclass(frozen=True, slots=True)
class Function:
    """A function as a reference shows it."""

    name: str
    parameters: str
    names: tuple[str, ...]
    words: str


@lru_cache(maxsize=512)
def _functions(text: str) -> tuple[Function, ...]:
    """List a Python file's public functions with parameters; none where it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            # Of other people's strings.
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except SyntaxError:
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            names = tuple(
                each.arg
                for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if each.arg not in ("self", "cls")
            )
            words = (ast.get_docstring(node) or "").split("\n\n")[0]
            shown = ast.unparse(node.args).removeprefix("self, ").removeprefix("cls, ")
            if names and len(shown) < 200:
                found.append(Function(node.name, shown, names, " ".join(words.split())[:300]))
    return tuple(found)


def function_reference(draw: Draw) -> Made | None:
    """A reference of functions: parameters, a call, which function does a thing."""
    rng = draw.rng
    form = rng.choice(
        (
            "### `{name}({p})`\n\n{w}",
            ".. function:: {name}({p})\n\n   {w}",
            "{name}({p}): {w}",
            "NAME\n    {name}\nSYNOPSIS\n    {name}({p})\nDESCRIPTION\n    {w}",
        )
    )
    drawn = _python_functions(draw)

    def write(one: Function) -> str:
        shown = form.replace("{name}", one.name).replace("{p}", one.parameters)
        return shown.replace("{w}", one.words).rstrip(" :\n")

    functions: list[Function] = []
    left = float(draw.tokens)
    for one in drawn:
        functions.append(one)
        left -= estimate_tokens(write(one)) + 1
        if left < 0:
            break
    if len(functions) < 4:
        return None
    function = rng.choice(functions)
    fields = {"name": function.name, "quote": function.words}
    listed = ", ".join(function.names)
    wording = "function_reference"
    asks = [
        Ask(wording=f"{wording}/takes", fields=fields, reference=listed, max_new_tokens=64),
        Ask(wording=f"{wording}/call", fields=fields, max_new_tokens=64),
        Ask(wording=f"{wording}/use", fields=fields, max_new_tokens=160),
    ]
    described = once((one for one in functions if one.words), lambda one: one.words)
    if described:
        one = rng.choice(described)
        fields = {"quote": one.words}
        asks.append(Ask(wording=f"{wording}/which", fields=fields, reference=one.name))
    return asked(draw, list(map(write, functions)), asks)


def _python_functions(draw: Draw) -> Iterator[Function]:
    """Draw functions of different names, of several files of a package each."""
    taken: set[str] = set()
    for _ in range(400):
        text = draw.library.texts[draw.library.draw_index(draw.rng, "code")]
        if text.language != "py":
            continue
        found = [one for one in _functions(text.text) if one.words] or _functions(text.text)
        for one in found[: draw.rng.randint(3, 25)]:
            if one.name not in taken:
                taken.add(one.name)
                yield one


def _files(draw: Draw) -> list[Text]:
    """Draw Python files of a package, and of others where it is small, up to the drawn length."""
    library, rng = draw.library, draw.rng
    kept: dict[int, Text] = {}
    left = draw.tokens
    for _ in range(120):
        if left < 200:
            break
        source = library.texts[library.draw_index(rng, "code")].source
        group = library.indices(f"source/{source}")
        python = [at for at in group if library.texts[at].language == "py" and at not in kept]
        for at in rng.sample(python, min(len(python), 20)):
            whole = library.texts[at]
            shown = library.run(rng, at, left)
            if left < 200 or (len(shown) < len(whole.text.strip("\n")) and rng.random() < 0.6):
                continue
            kept[at] = Text(whole.register, whole.source, whole.title, "py", shown)
            left -= int(len(shown) / (library.chars(whole, 1000) / 1000)) + 10
    return list(kept.values())


def _callers(files: list[Text], name: str) -> list[str]:
    """List the functions in whose lines a name is called."""
    callers: dict[str, None] = {}
    for file in files:
        current = ""
        for line in file.text.split("\n"):
            defined = _DEFINED.match(line)
            if defined:
                current = defined[1]
            elif current and current != name and re.search(rf"\b{name}\(", line):
                callers[current] = None
    return list(callers)


def code_lookup(draw: Draw) -> Made | None:
    """Many files of code: where a function is defined, what it takes, what calls it."""
    rng = draw.rng
    files = _files(draw)
    places: dict[str, list[Text]] = defaultdict(list)
    for file in files:
        for name in _DEFINED.findall(file.text):
            places[name].append(file)
    alone = sorted(name for name, where in places.items() if len(where) == 1)
    if not alone:
        return None
    name = rng.choice(alone)
    head = rng.choice(("# {path}\n", "=== {path} ===\n", '<file path="{path}">\n', "{path}:\n\n"))
    paths = {file.title: code_title(file) for file in files}
    parts = [head.replace("{path}", paths[file.title]) + file.text for file in files]
    [file] = places[name]
    fields = {"name": name}
    asks = [
        Ask(wording="code_lookup/where", fields=fields, reference=paths[file.title]),
        Ask(wording="code_lookup/takes", fields=fields, max_new_tokens=96),
        Ask(wording="code_lookup/explain", fields=fields, max_new_tokens=160),
    ]
    for name in rng.sample(alone, min(len(alone), 30)):
        callers = _callers(files, name)
        if 1 <= len(callers) <= MOST_COUNTED:
            fields, listed = {"name": name}, ", ".join(callers)
            asks.append(
                Ask(
                    wording="code_lookup/callers",
                    fields=fields,
                    reference=listed,
                    max_new_tokens=80,
                )
            )
            break
    return asked(draw, parts, asks)


KINDS = [
    Kind(name="database_schema", weight=2, local=False, make=database_schema),
    Kind(name="function_reference", weight=2, local=False, make=function_reference),
    Kind(name="code_lookup", weight=2, local=False, make=code_lookup),
]
