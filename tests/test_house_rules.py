"""The laws of the house style, each as a test: sizes, imports, prints, docstrings.

Oracle: the source text itself, read with `ast`; nothing of the project is imported.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (REPOSITORY / folder).rglob("*.py"))


def _name(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


CODE = _files("flux_vllm", "training", "demo", "deploy")
LIBRARY = _files("flux_vllm", "training")


def _each(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=_name)


def _functions(file: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, Function):
            yield node


def _body_lines(function: Function) -> int:
    """Count a function's lines below its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def _imports(file: Path) -> Iterator[str]:
    """Give every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(file)}:{node.lineno}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@_each(CODE)
def test_file_is_short(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines, at most {MAX_FILE_LINES}: split it by concept"


@_each(CODE)
def test_functions_are_short(file: Path) -> None:
    lengths = {f"{f.name}:{f.lineno}": _body_lines(f) for f in _functions(file)}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    assert not long, f"functions of more than {MAX_FUNCTION_LINES} lines: {long}"


@_each([file for file in LIBRARY if "cli" not in file.parts and file.name != "__main__.py"])
def test_library_does_not_print(file: Path) -> None:
    prints = [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not prints, f"print in lines {prints}: log, or return what is to be shown"


@_each([*_files("flux_vllm/router"), REPOSITORY / "flux_vllm/attention_backend/naive.py"])
def test_router_and_naive_import_only_torch(file: Path) -> None:
    allowed = (
        *sys.stdlib_module_names,
        "torch",
        "numpy",
        "safetensors",
        "flux_vllm.errors",
        "flux_vllm.router",
    )
    foreign = [module for module in _imports(file) if not _within(module, allowed)]
    assert not foreign, f"imports {foreign}; the router runs without vLLM"


@_each(_files("flux_vllm"))
def test_package_imports_nothing_of_the_checkout(file: Path) -> None:
    checkout = ("training", "demo", "benchmarks", "tests", "tools")
    foreign = [module for module in _imports(file) if _within(module, checkout)]
    assert not foreign, f"imports {foreign}, which the wheel does not ship"


@_each(_files("flux_vllm/attention_backend", "flux_vllm/metrics", "flux_vllm/patterns"))
def test_backend_does_not_import_what_shows_it(file: Path) -> None:
    shown_by = ("flux_vllm.cli", "flux_vllm.live")
    foreign = [module for module in _imports(file) if _within(module, shown_by)]
    assert not foreign, f"imports {foreign}; arrows point from what users see inward"


@_each(_files("training"))
def test_training_imports_only_the_router(file: Path) -> None:
    allowed = ("flux_vllm.router", "flux_vllm.errors", "flux_vllm.__version__")
    foreign = [
        module
        for module in _imports(file)
        if _within(module, ("flux_vllm", "vllm", "demo", "benchmarks"))
        and not _within(module, allowed)
    ]
    assert not foreign, f"imports {foreign}; of the package, training sees the router alone"


@_each(LIBRARY)
def test_public_names_have_docstrings(file: Path) -> None:
    tree = ast.parse(file.read_text())
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                missing.append(f"{node.name}:{node.lineno}")
            # Methods of a derived class may override one whose contract stands upstream.
            if isinstance(node, ast.ClassDef) and not node.bases:
                missing += [
                    f"{node.name}.{method.name}:{method.lineno}"
                    for method in node.body
                    if isinstance(method, Function)
                    and not method.name.startswith("_")
                    and not ast.get_docstring(method)
                ]
    assert not missing, f"no docstring: {missing}"


@pytest.mark.parametrize("module", ["flux_vllm.plugin", "flux_vllm.cli"])
def test_import_is_light(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
