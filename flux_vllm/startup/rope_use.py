"""How a model's attention module uses RoPE, read from its source: vLLM keeps no record of it.

Only a query that was rotated, and then handed to attention as it was, can be rotated back.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from flux_vllm.startup.transformers_rotary import ROTATION

_RESHAPES = {"contiguous", "flatten", "reshape", "squeeze", "to", "unflatten", "unsqueeze", "view"}
_FACTS = {"device", "dtype", "shape"}
"""Attributes of a tensor that may be read without touching its values."""
_CONSTANT = (
    *(ast.Attribute, ast.BoolOp, ast.Compare, ast.Constant, ast.Load, ast.Name, ast.UnaryOp),
    *(ast.boolop, ast.cmpop, ast.unaryop),
)
"""What a condition may be made of that is the same whenever the module is called."""
_ROPE = re.compile("rope|rotar|rotat|freqs|sin_?cos|cos_?sin", re.IGNORECASE)
"""What code that rotates calls its parts."""
_ROTATIONS = ("self.rotary_emb", ROTATION)
"""What rotates queries, in vLLM's own models and in transformers'."""
_ATTENTION = {"self.attn": 0, "attention_interface": 1}
"""What attends, in these, and at which place it takes the queries."""
_BRANCHES = (ast.IfExp, ast.For, ast.Match, ast.Try, ast.While, ast.With)
"""What may run a part of itself or not; `if` is looked into."""


def rotates(attention: Any) -> bool | None:
    """Say whether a module rotates its queries.

    Some models leave RoPE out in some layers: conditions on the module's own attributes are looked
    up, since they are the same for all its calls.

    Returns: None where that depends on anything else, there is no source to be read, or it rotates
        by another name than `rotary_emb`.
    """
    kind: Any = type(attention)
    tree = _rotating_function(kind)
    if tree is None:
        return None if _speaks_of_rope(kind) else False
    found: list[bool | None] = []
    for node, is_conditional in _statements(tree.body, attention):
        if _rotates_within(node):
            parts = ast.walk(node)
            branches = is_conditional or any(isinstance(part, _BRANCHES) for part in parts)
            found.append(None if branches else True)
    return None if None in found else bool(found)


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
    change, place = _follow(tree, attention, _is_rotation)
    caller = None if place is None else _calling_function(kind, tree.name)
    if caller is None or place is None:
        return change
    call = f"self.{tree.name}"
    return _follow(caller, attention, functools.partial(_is_call, name=call), place)[0]


def _follow(
    tree: ast.FunctionDef, attention: Any, makes: Callable[[ast.AST], bool], place: int = 0
) -> tuple[str | None, int | None]:
    """Follow queries through a method.

    Args:
        tree: of the method.
        attention: the module.
        makes: says whether an expression makes the queries.
        place: theirs, where it makes several things.

    Returns: what changes them, or None; and their place where the method returns them among others
        instead of attending, else None.
    """
    names: set[str] = set()
    reached, returned = False, None
    for node, _ in _statements(tree.body, attention):
        if isinstance(node, ast.Assign) and makes(node.value):
            names.add(_target(node, place))
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and _is_reshape(node.value, names)
        ):
            names.add(node.targets[0].id)
        elif _hands_on(node, names):
            reached = True
        elif (found := _returned_place(node, names)) is not None:
            returned = found
        elif not isinstance(node, ast.Delete) and (
            _uses(node, names) or any(makes(part) for part in ast.walk(node))
        ):
            return ast.unparse(node), None
    if reached:
        return None, None
    return f"{tree.name}() without self.attn(q, ...)", returned


@functools.cache
def _rotating_function(attention_class: type) -> ast.FunctionDef | None:
    """Parse the method that calls `self.rotary_emb`; None where there is none to be read."""
    for owner in attention_class.__mro__:
        for function in vars(owner).values():
            if not inspect.isfunction(function) or function.__name__ == "__init__":
                continue
            tree = _parse(function)
            if tree is not None and _rotates_within(tree):
                return tree
    return None


@functools.cache
def _speaks_of_rope(attention_class: type) -> bool:
    """Say whether a name in a module's methods may stand for RoPE, or they cannot be read."""
    for owner in attention_class.__mro__:
        if owner.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for function in filter(inspect.isfunction, vars(owner).values()):
            tree = _parse(function)
            if tree is None or any(_ROPE.search(name) for name in _names(tree)):
                return True
    return False


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        yield from (
            value
            for name in ("id", "attr", "arg")
            if isinstance(value := getattr(node, name, None), str)
        )


def _parse(function: Callable) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


@functools.cache
def _calling_function(attention_class: type, name: str) -> ast.FunctionDef | None:
    """Parse the method that calls another one; None where there is none to be read."""
    for owner in attention_class.__mro__:
        for function in filter(inspect.isfunction, vars(owner).values()):
            tree = _parse(function)
            if tree and any(_is_call(part, f"self.{name}") for part in ast.walk(tree)):
                return tree
    return None


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name


def _is_rotation(node: ast.AST) -> bool:
    return any(_is_call(node, name) for name in _ROTATIONS)


def _rotates_within(node: ast.AST) -> bool:
    return any(_is_rotation(part) for part in ast.walk(node))


def _statements(
    body: list[ast.stmt], attention: Any, is_conditional: bool = False
) -> Iterator[tuple[ast.AST, bool]]:
    """Give statements in the order of the text, with the conditions that they stand under.

    What a condition on the module's own attributes switches off is left out.

    Returns: of each, whether it stands under a condition that may change from call to call.
    """
    for node in body:
        if isinstance(node, ast.If):
            yield node.test, is_conditional
            holds = _truth(node.test, attention)
            unknown = is_conditional or holds is None
            if holds is not False:
                yield from _statements(node.body, attention, unknown)
            if holds is not True:
                yield from _statements(node.orelse, attention, unknown)
        else:
            yield node, is_conditional


def _truth(test: ast.expr, attention: Any) -> bool | None:
    """Evaluate a condition that reads nothing but the module's own attributes; None for others."""
    parts = list(ast.walk(test))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    if names != {"self"} or not all(isinstance(part, _CONSTANT) for part in parts):
        return None
    code = compile(ast.Expression(test), "<condition>", "eval")
    try:
        return bool(eval(code, {"__builtins__": {}}, {"self": attention}))
    except (AttributeError, TypeError, RuntimeError):  # an attribute that is not there, or a tensor
        return None


def _target(node: ast.Assign, place: int) -> str:
    target = node.targets[0]
    return ast.unparse(target.elts[place] if isinstance(target, ast.Tuple) else target)


def _returned_place(node: ast.AST, names: set[str]) -> int | None:
    """Say at which place a statement returns the queries, used nowhere else in it."""
    if not (isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)):
        return None
    places = [i for i, part in enumerate(node.value.elts) if ast.unparse(part) in names]
    return places[0] if len(places) == 1 and _uses(node, names) == 1 else None


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
        place = _ATTENTION.get(ast.unparse(call.func)) if isinstance(call, ast.Call) else None
        if isinstance(call, ast.Call) and place is not None and len(call.args) > place:
            query = call.args[place]
            return _is_reshape(query, names) and _uses(node, names) == _uses(query, names)
    return False


def _is_reshape(value: ast.AST, names: set[str]) -> bool:
    """Say whether a value is one of the names, behind reshaping methods alone."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr not in _RESHAPES:
            return False
        value = value.func.value
    return ast.unparse(value) in names
