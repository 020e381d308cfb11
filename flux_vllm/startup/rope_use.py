"""How a model's attention module uses RoPE, read from its source: vLLM keeps no record of it.

Only a query that was rotated, and then handed to attention as it was, can be rotated back.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

_RESHAPES = {"contiguous", "flatten", "reshape", "squeeze", "to", "unflatten", "unsqueeze", "view"}
_FACTS = {"device", "dtype", "shape"}
"""Attributes of a tensor that may be read without touching its values."""


def rotates_always(attention_class: type) -> bool:
    """Say whether an attention module rotates its queries whatever its layer.

    Some models give every layer a rotary embedding and leave it out in some of them:
    `self.rotary_emb(...)` has to be called, and outside of any condition.
    """
    tree = _rotating_function(attention_class)
    if tree is None:
        return False
    calls = [
        any(isinstance(parent, ast.If | ast.IfExp) for parent in parents)
        for node, parents in _walk(tree)
        if _is_rotation(node)
    ]
    return not any(calls)


def change_after_rope(attention: Any) -> str | None:
    """Find what a module does to its queries between RoPE and attention, such as a temperature.

    Only what is known to leave queries as they are passes: `q, k = self.rotary_emb(...)`, a new
    name or shape for them, and `self.attn(q, ...)`. All else that touches them is taken for a
    change.

    Args:
        attention: the module; conditions on its own attributes are looked up, so that a class
            which scales queries for some models only is known by its instances.

    Returns: the statement, as source text; None where queries reach attention as RoPE made them.
    """
    kind: Any = type(attention)
    tree = _rotating_function(kind)
    if tree is None:
        return None
    names: set[str] = set()
    reached = False
    for node in _simple_statements(tree.body, attention):
        if isinstance(node, ast.Assign) and _is_rotation(node.value):
            names.add(_first_target(node))
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and _is_reshape(node.value, names)
        ):
            names.add(node.targets[0].id)
        elif _hands_on(node, names):
            reached = True
        elif not isinstance(node, ast.Delete) and (
            _uses(node, names) or any(_is_rotation(part) for part in ast.walk(node))
        ):
            return ast.unparse(node)
    return None if reached else f"{tree.name}() without self.attn(q, ...)"


@functools.cache
def _rotating_function(attention_class: type) -> ast.FunctionDef | None:
    """Parse the method that calls `self.rotary_emb`; None where there is none to be read."""
    for owner in attention_class.__mro__:
        for function in vars(owner).values():
            if not inspect.isfunction(function) or function.__name__ == "__init__":
                continue
            tree = _parse(function)
            if tree is not None and any(_is_rotation(node) for node, _ in _walk(tree)):
                return tree
    return None


def _parse(function: Callable) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _walk(node: ast.AST, parents: tuple = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Give every node with its parents, in the order of the text."""
    yield node, parents
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, (*parents, node))


def _is_rotation(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "self.rotary_emb"


def _simple_statements(body: list[ast.stmt], attention: Any) -> Iterator[ast.AST]:
    """Give statements in the order of the text, with the conditions that they stand under.

    What a condition on the module's own attributes switches off is left out.
    """
    for node in body:
        if isinstance(node, ast.If):
            yield node.test
            if not _is_off(node, attention):
                yield from _simple_statements(node.body, attention)
            yield from _simple_statements(node.orelse, attention)
        else:
            yield node


def _first_target(node: ast.Assign) -> str:
    target = node.targets[0]
    return ast.unparse(target.elts[0] if isinstance(target, ast.Tuple) else target)


def _uses(node: ast.AST, names: set[str]) -> int:
    """Count where any of the names is read or written, facts about it aside."""
    if isinstance(node, ast.Attribute) and node.attr in _FACTS:
        return 0
    if isinstance(node, ast.Name):
        return int(node.id in names)
    return sum(_uses(child, names) for child in ast.iter_child_nodes(node))


def _hands_on(node: ast.AST, names: set[str]) -> bool:
    """Say whether a statement calls attention with the queries, and uses them nowhere else."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "self.attn" and call.args:
            query = call.args[0]
            return _is_reshape(query, names) and _uses(node, names) == _uses(query, names)
    return False


def _is_reshape(value: ast.AST, names: set[str]) -> bool:
    """Say whether a value is one of the names, behind reshaping methods alone."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr not in _RESHAPES:
            return False
        value = value.func.value
    return ast.unparse(value) in names


def _is_off(node: ast.If, attention: Any) -> bool:
    """Say whether a condition is `if self.NAME` and the module's NAME is false."""
    test = node.test
    return (
        isinstance(test, ast.Attribute)
        and ast.unparse(test.value) == "self"
        and not getattr(attention, test.attr, True)
    )
