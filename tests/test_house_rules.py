"""The laws of the house style, each as a test over all files: sizes, imports, prints, docstrings.

Oracle: the source text itself, read with `ast`; nothing of the project is imported.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FLOORS = 10

IMPORTS_VLLM = (
    "flux_vllm/attention_backend/backend.py",
    "flux_vllm/attention_backend/cpu/backend.py",
    "flux_vllm/attention_backend/cpu/batch_plan.py",
    "flux_vllm/attention_backend/cpu/pages.py",
    "flux_vllm/attention_backend/cuda/backend.py",
    "flux_vllm/attention_backend/cuda/calls.py",
    "flux_vllm/attention_backend/cuda/choose.py",
    "flux_vllm/attention_backend/cuda/fa3_calls.py",
    "flux_vllm/attention_backend/cuda/float8.py",
    "flux_vllm/attention_backend/cuda/memory.py",
    "flux_vllm/attention_backend/cuda/triton_calls.py",
    "flux_vllm/attention_backend/cuda/warm_up.py",
    "flux_vllm/attention_backend/kernels/fa3.py",
    "flux_vllm/cli/routes.py",
    "flux_vllm/cli/serve.py",
    "flux_vllm/hooks/front_end.py",
    "flux_vllm/hooks/worker.py",
    "flux_vllm/kv/channel.py",
    "flux_vllm/kv/check.py",
    "flux_vllm/kv/coordinator.py",
    "flux_vllm/kv/hits.py",
    "flux_vllm/kv/manager.py",
    "flux_vllm/kv/register.py",
    "flux_vllm/kv/scheduler.py",
    "flux_vllm/kv/spec.py",
    "flux_vllm/kv/worker.py",
    "flux_vllm/plugin.py",
    "flux_vllm/routing/model_call.py",
    "flux_vllm/routing/stages.py",
    "flux_vllm/routing/state_layers.py",
    "flux_vllm/startup/attach.py",
    "flux_vllm/startup/drafter.py",
    "flux_vllm/startup/layers.py",
    "flux_vllm/startup/memory.py",
    "flux_vllm/startup/report.py",
)
"""Where vLLM may be imported: what to look at when a version of it comes."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (REPOSITORY / folder).rglob("*.py"))


def _name(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


CODE = _files("flux_vllm", "training", "demo", "deploy")
CHECKOUT = [*CODE, *_files("benchmarks", "tools", "tests")]
PACKAGE = _files("flux_vllm")
LIBRARY = _files("flux_vllm", "training")


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _offences(files: list[Path], find: Callable[[Path], object]) -> dict[str, object]:
    """Give what is found in each file that has any."""
    return {_name(file): found for file in files if (found := find(file))}


def _functions(file: Path) -> Iterator[Function]:
    for node in ast.walk(_tree(file)):
        if isinstance(node, Function):
            yield node


def _body_lines(function: Function) -> int:
    """Count a function's lines below its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


@cache
def _imports(file: Path) -> tuple[str, ...]:
    """Give every module that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(file)}:{node.lineno}: import by the full name"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _importing(files: list[Path], *packages: str) -> dict[str, object]:
    """Give the imports of some packages."""
    return _offences(files, lambda file: [m for m in _imports(file) if _within(m, packages)])


def _arrows(files: list[Path]) -> dict[str, set[str]]:
    """Give modules and what each imports of the others, types included."""
    modules = {}
    for file in files:
        modules[_name(file).removesuffix(".py").replace("/", ".").removesuffix(".__init__")] = file
    arrows = {}
    for module, file in modules.items():
        # `from a import b` names the module a.b, or something in the module a.
        named = {m if m in modules else m.rpartition(".")[0] for m in _imports(file)}
        arrows[module] = (named & modules.keys()) - {module}
    return arrows


def test_files_are_short() -> None:
    def too_long(file: Path) -> int:
        lines = len(file.read_text().splitlines())
        return lines if lines > MAX_FILE_LINES else 0

    long = _offences(CHECKOUT, too_long)
    assert not long, f"files of more than {MAX_FILE_LINES} lines, to be split by concept: {long}"


def test_functions_are_short() -> None:
    def too_long(file: Path) -> dict[str, int]:
        lengths = {f"{f.name}:{f.lineno}": _body_lines(f) for f in _functions(file)}
        return {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}

    long = _offences(CODE, too_long)
    assert not long, f"functions of more than {MAX_FUNCTION_LINES} lines: {long}"


def test_calls_name_their_arguments() -> None:
    """From nine on; but for vLLM's own functions and kernels of Triton, which take no fewer."""
    theirs = {"torch.ops._vllm_fa3_C.fwd", "super().forward"}

    def unnamed(file: Path) -> list[int]:
        kernels = [
            range(function.lineno, (function.end_lineno or 0) + 1)
            for function in _functions(file)
            if any("triton.jit" in ast.unparse(by) for by in function.decorator_list)
        ]
        return [
            call.lineno
            for call in ast.walk(_tree(file))
            if isinstance(call, ast.Call)
            and sum(not isinstance(argument, ast.Starred) for argument in call.args) >= 9
            and not isinstance(call.func, ast.Subscript)  # kernel[grid](...)
            and ast.unparse(call.func) not in theirs
            and not any(call.lineno in kernel for kernel in kernels)
        ]

    found = _offences(CHECKOUT, unnamed)
    assert not found, f"calls of nine or more arguments by place, to be named: {found}"


def test_library_does_not_print() -> None:
    def prints(file: Path) -> list[int]:
        return [
            node.lineno
            for node in ast.walk(_tree(file))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ]

    library = [file for file in LIBRARY if "cli" not in file.parts and file.name != "__main__.py"]
    found = _offences(library, prints)
    assert not found, f"prints, by line: {found}; log, or return what is to be shown"


def _floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """Give each module's floor: one above the highest that it imports. Fails on a circle."""
    floors: dict[str, int] = {}

    def floor(module: str, path: tuple[str, ...]) -> int:
        assert module not in path, f"circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in floors:
            below = [floor(other, (*path, module)) for other in sorted(arrows[module])]
            floors[module] = 1 + max(below, default=0)
        return floors[module]

    for module in arrows:
        floor(module, ())
    return floors


def test_imports_run_in_no_circle() -> None:
    _floors(_arrows(CHECKOUT))


def test_the_package_has_few_floors() -> None:
    floors = _floors(_arrows(PACKAGE))
    high = {module: number for module, number in floors.items() if number > MAX_FLOORS}
    assert not high, f"modules above floor {MAX_FLOORS}: {high}"


def test_vllm_is_imported_where_it_is_said() -> None:
    found = _importing(PACKAGE, "vllm")
    assert sorted(found) == sorted(IMPORTS_VLLM)


def test_routers_and_patterns_import_only_torch() -> None:
    allowed = (
        *sys.stdlib_module_names,
        "torch",
        "numpy",
        "safetensors",
        "flux_vllm.batch",
        "flux_vllm.errors",
        "flux_vllm.patterns",
        "flux_vllm.router",
    )
    files = _files("flux_vllm/router", "flux_vllm/patterns")
    foreign = _offences(files, lambda file: [m for m in _imports(file) if not _within(m, allowed)])
    assert not foreign, f"{foreign}; routers and patterns run without vLLM"


def test_package_imports_nothing_of_the_checkout() -> None:
    foreign = _importing(PACKAGE, "training", "demo", "benchmarks", "tests", "tools")
    assert not foreign, f"{foreign}; the wheel does not ship these"


def test_what_serves_does_not_import_what_shows_it() -> None:
    served = _files(
        *(f"flux_vllm/{name}" for name in ("attention_backend", "hooks", "kv", "metrics")),
        *(f"flux_vllm/{name}" for name in ("patterns", "router", "routing", "startup")),
    )
    foreign = _importing(served, "flux_vllm.cli", "flux_vllm.live", "flux_vllm.importer")
    assert not foreign, f"{foreign}; arrows point from what users see inward"


def test_training_imports_only_routers_and_patterns() -> None:
    allowed = (
        "flux_vllm.router",
        "flux_vllm.patterns",
        "flux_vllm.errors",
        "flux_vllm.__version__",
    )
    others = ("flux_vllm", "vllm", "demo", "benchmarks")
    foreign = _offences(
        _files("training"),
        lambda file: [m for m in _imports(file) if _within(m, others) and not _within(m, allowed)],
    )
    assert not foreign, f"{foreign}; of the package, training sees routers and patterns alone"


def test_public_names_have_docstrings() -> None:
    missing = _offences(LIBRARY, _without_docstring)
    assert not missing, f"no docstring: {missing}"


def _without_docstring(file: Path) -> list[str]:
    tree = _tree(file)
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
    return missing


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
