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
    """Find what changes a module's queries between RoPE and attention, such as a temperature.

    Args:
        attention: the module; conditions on its own attributes are looked up, so that a class
            which scales queries for some models only is known by its instances.

    Returns: the statement, as source text; None where queries are at most reshaped.
    """
    kind: Any = type(attention)
    tree = _rotating_function(kind)
    if tree is None:
        return None
    names: set[str] = set()
    for node, parents in _walk(tree):
        if isinstance(node, ast.Assign) and _is_rotation(node.value):
            names.add(_first_target(node))
        elif (
            isinstance(node, ast.Assign | ast.AugAssign)
            and _first_target(node) in names
            and not (isinstance(node, ast.Assign) and _is_reshape(node.value, names))
            and not any(_is_off(parent, attention) for parent in parents)
        ):
            return ast.unparse(node)
    return None


@functools.cache
def _rotating_function(attention_class: type) -> ast.AST | None:
    """Parse the method that calls `self.rotary_emb`; None where there is none to be read."""
    for owner in attention_class.__mro__:
        for function in vars(owner).values():
            if not inspect.isfunction(function) or function.__name__ == "__init__":
                continue
            tree = _parse(function)
            if tree is not None and any(_is_rotation(node) for node, _ in _walk(tree)):
                return tree
    return None


def _parse(function: Callable) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return None


def _walk(node: ast.AST, parents: tuple = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Give every node with its parents, in the order of the text."""
    yield node, parents
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, (*parents, node))


def _is_rotation(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "self.rotary_emb"


def _first_target(node: ast.Assign | ast.AugAssign) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return ast.unparse(target.elts[0] if isinstance(target, ast.Tuple) else target)


def _is_reshape(value: ast.AST, names: set[str]) -> bool:
    """Say whether a value is one of the names, behind reshaping methods alone."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr not in _RESHAPES:
            return False
        value = value.func.value
    return ast.unparse(value) in names


def _is_off(node: ast.AST, attention: Any) -> bool:
    """Say whether a node is `if self.NAME` and the module's NAME is false."""
    test = node.test if isinstance(node, ast.If) else None
    return (
        isinstance(test, ast.Attribute)
        and ast.unparse(test.value) == "self"
        and not getattr(attention, test.attr, True)
    )
