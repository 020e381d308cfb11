"""Every name that we import of vLLM is there in 0.32 and in 0.33; no abstract method is left out.

Oracle: vLLM's own sources of both versions, read with `ast` by tests/helpers/vllm_names.py: modules
that only a GPU's engine loads are read too, and where a name moved, both of its places.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.vllm_names import (
    ClassOf,
    Import,
    find_class,
    has,
    imports,
    module_file,
    unimplemented,
)
from tests.unit.hooks.test_sources import VERSIONS

pytestmark = pytest.mark.vllm

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDERS = ("flux_vllm", "training", "benchmarks", "demo", "deploy", "tools", "tests")
CODE = sorted(file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*.py"))
PACKAGE = [file for file in CODE if file.is_relative_to(REPOSITORY / "flux_vllm")]


def imported(tree: ast.AST) -> dict[str, Import]:
    """Return by its name in a file what it imports of vLLM."""
    return {one.known_as: one for ways in imports(tree) for way in ways for one in way}


def missing_names(version: str, tree: ast.AST) -> list[str]:
    """Name what a file imports and a version has not."""
    return [
        f"line {ways[0][0].line}: {' or '.join(', '.join(map(str, way)) for way in ways)}"
        for ways in imports(tree)
        if not any(all(has(version, one.module, one.name) for one in way) for way in ways)
    ]


def missing_attributes(version: str, tree: ast.AST) -> list[str]:
    """Name what a file reads of a module of vLLM's and a version's module has not."""
    modules = {
        name: str(one)
        for name, one in imported(tree).items()
        if module_file(version, str(one)) is not None
    }
    read = {
        (modules[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and not node.attr.startswith("__")  # what Python gives every module
    }
    return [f"{module}.{name}" for module, name in sorted(read) if not has(version, module, name)]


def subclasses(version: str, tree: ast.Module) -> Iterator[tuple[ast.ClassDef, dict[str, str]]]:
    """Give a file's classes with the methods that vLLM's bases of each leave to it."""
    known = imported(tree)
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in classes.values():
        left: dict[str, str] = {}
        for base in map(ast.unparse, node.bases):
            one = known.get(base)
            if one is None or one.name is None:
                continue
            parent = find_class(version, one.module, one.name)
            assert parent is not None, f"{version}: no class {one}"
            left |= unimplemented(version, parent)
        own = [node, *(classes[base] for base in map(ast.unparse, node.bases) if base in classes)]
        for part in own:
            for statement in part.body:
                left.pop(getattr(statement, "name", ""), None)
        yield node, left


@pytest.mark.parametrize("version", VERSIONS)
class TestBothVersionsHave:
    @pytest.mark.parametrize("missing", [missing_names, missing_attributes])
    def test_every_name_that_we_import_or_read(
        self, version: str, missing: Callable[[str, ast.AST], list[str]]
    ) -> None:
        found = {
            str(file.relative_to(REPOSITORY)): names
            for file in CODE
            if (names := missing(version, ast.parse(file.read_text())))
        }
        assert found == {}

    def test_no_abstract_method_that_we_leave_out(self, version: str) -> None:
        found = {
            f"{file.relative_to(REPOSITORY)} {node.name}": left
            for file in PACKAGE
            for node, left in subclasses(version, ast.parse(file.read_text()))
            if left
        }
        assert found == {}


class TestTheReadersThemselves:
    """By cases that once broke every engine on a GPU."""

    def test_a_name_that_moved_is_noticed(self) -> None:
        tree = ast.parse("from vllm.utils.torch_utils import is_quantized_kv_cache")
        assert missing_names("installed", tree) == []
        (line,) = missing_names("0.33.0", tree)
        assert line == "line 1: vllm.utils.torch_utils.is_quantized_kv_cache"

    def test_one_of_two_places_is_enough(self) -> None:
        new = "from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder"
        old = "from vllm.v1.core.kv_cache_utils import get_kv_cache_groups"
        tree = ast.parse(f"def f():\n try:\n  {new}\n except ImportError:\n  {old}")
        for version in VERSIONS:
            assert missing_names(version, tree) == []
        assert missing_names("installed", ast.parse(new))
        assert missing_names("0.33.0", ast.parse(old))

    def test_names_that_are_imported_again_count(self) -> None:
        for version in VERSIONS:
            for name in ("LLM", "SamplingParams", "envs", "__version__"):
                assert has(version, "vllm", name), name
            assert has(version, "vllm.envs", "VLLM_CPU_ATTN_SPLIT_KV")
            assert not has(version, "vllm", "Nothing")
            assert not has(version, "vllm.nothing", None)

    def test_an_attribute_that_is_not_there_is_noticed(self) -> None:
        tree = ast.parse("from vllm import _custom_ops as ops\nops.scaled_fp8_quant\nops.nothing")
        assert missing_attributes("installed", tree) == ["vllm._custom_ops.nothing"]

    def test_a_new_abstract_method_is_noticed(self) -> None:
        tree = ast.parse(
            "from vllm.v1.outputs import AsyncModelRunnerOutput\n"
            "class Late(AsyncModelRunnerOutput):\n def get_output(self): ...\n"
        )
        left = {version: [m for _, m in subclasses(version, tree)][0] for version in VERSIONS}
        assert left["installed"] == {}
        assert left["0.33.0"] == {"get_kv_connector_output": "AsyncModelRunnerOutput"}

    def test_methods_that_a_class_between_has_are_not_left(self) -> None:
        for version in VERSIONS:
            module = "vllm.v1.attention.backends.flash_attn"
            found = find_class(version, module, "FlashAttentionImpl")
            assert isinstance(found, ClassOf)
            assert unimplemented(version, found) == {}
