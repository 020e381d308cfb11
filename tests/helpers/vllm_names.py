"""What names vLLM's modules have, read with `ast` from the sources of any version.

Nothing of vLLM is imported: of one of two versions only the Python files are there.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.unit.hooks.test_sources import package, parsed


class Import(NamedTuple):
    """One name that a file takes of vLLM."""

    module: str
    name: str | None
    """None for the module itself."""
    known_as: str
    line: int

    def __str__(self) -> str:
        return self.module if self.name is None else f"{self.module}.{self.name}"


class ClassOf(NamedTuple):
    """A class and the module of vLLM that defines it."""

    module: str
    node: ast.ClassDef


def imports(tree: ast.AST) -> Iterator[list[list[Import]]]:
    """List what a file imports of vLLM, with the alternatives of each.

    Args:
        tree: of the file, or of a part of it.

    Yields: alternatives, of which a version must have one, each a list of names. An import stands
        alone; `try: import ... except ImportError: import ...` is one of two ways.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Try) and any(_is_import_error(h) for h in node.handlers):
            ways = [node.body, *(h.body for h in node.handlers if _is_import_error(h))]
            named = [_flat(ast.Module(way, [])) for way in ways]
            if named[0]:  # an alternative that imports nothing says what to do without
                yield named
            yield from imports(ast.Module([*node.orelse, *node.finalbody], []))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ([[one]] for one in _named(node))
        else:
            yield from imports(node)


def _flat(tree: ast.AST) -> list[Import]:
    return [one for ways in imports(tree) for one in ways[0]]


def _is_import_error(handler: ast.ExceptHandler) -> bool:
    return handler.type is not None and "ImportError" in ast.unparse(handler.type)


def _named(node: ast.Import | ast.ImportFrom) -> list[Import]:
    if isinstance(node, ast.Import):
        found = [(a.name, None, a.asname or a.name) for a in node.names]
    else:
        found = [(node.module or "", a.name, a.asname or a.name) for a in node.names]
        found = [] if node.level else found
    return [Import(*one, node.lineno) for one in found if one[0].split(".")[0] == "vllm"]


def module_file(version: str, module: str) -> str | None:
    """Return the file of a module below `vllm/`, None where the version has none."""
    stem = Path(*module.split(".")[1:])
    for file in (f"{stem}.py", str(stem / "__init__.py")):
        if (package(version) / file).is_file():
            return file
    return None


def has(version: str, module: str, name: str | None) -> bool:
    """Tell whether a version has a module, or a name in it."""
    if module_file(version, module) is None:
        return False
    if name is None or module_file(version, f"{module}.{name}") is not None:
        return True
    return name in _names(version, module)


@functools.cache
def _names(version: str, module: str) -> frozenset[str]:
    """Name what a module defines, imports, or gives lazily by a table of its own."""
    file = module_file(version, module)
    assert file is not None
    found: set[str] = set()
    for node in _statements(parsed(version, file)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            source = _absolute(module, file, node)
            found |= _names(version, source) if module_file(version, source) else set()
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {a.asname or a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            # `__getattr__` of vllm and vllm.envs looks names up in a dictionary.
            if isinstance(node.value, ast.Dict):
                found |= {k.value for k in node.value.keys if isinstance(k, ast.Constant)}
    return frozenset(found)


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Go through a module's statements, also under `if`, `try` and `with`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _statements(node)


def _absolute(module: str, file: str, node: ast.ImportFrom) -> str:
    """Return the module that an import in `module` names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    up = node.level - (Path(file).name == "__init__.py")
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def find_class(version: str, module: str, name: str) -> ClassOf | None:
    """Find a class where it is defined, following imports; None if it is not vLLM's."""
    file = module_file(version, module)
    if file is None:
        return None
    for node in _statements(parsed(version, file)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ClassOf(module, node)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_class(version, _absolute(module, file, node), alias.name)
    return None


def unimplemented(version: str, found: ClassOf) -> dict[str, str]:
    """Name the abstract methods that a class of vLLM leaves to its subclasses, with its origin."""
    missing: dict[str, str] = {}
    for base in reversed(found.node.bases):
        parent = find_class(version, found.module, ast.unparse(base).split("[")[0])
        if parent is not None:
            missing |= unimplemented(version, parent)
    for node in found.node.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_abstract = any("abstract" in ast.unparse(mark) for mark in node.decorator_list)
            missing.pop(node.name, None)
            if is_abstract:
                missing[node.name] = found.node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                missing.pop(ast.unparse(target), None)
    return missing
