"""A command line made from config dataclasses: one flag a field, its docstring the help."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from typing import Any, TypeVar

Config = TypeVar("Config")


def field_docs(config_type: type) -> dict[str, str]:
    """Read the docstrings below a dataclass's fields."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def add_flags(parser: argparse.ArgumentParser, config_type: type, defaults: Any) -> None:
    """Add a flag for every field, nested ones as --group.field.

    Args:
        parser: to add to.
        config_type: a dataclass.
        defaults: an instance; its values are shown as defaults. Flags left out stay unset, so
            that a recipe's values stand.
    """
    _add(parser, config_type, defaults, prefix="")


def _add(parser: Any, config_type: type, defaults: Any, prefix: str) -> None:
    docs = field_docs(config_type)
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        hint, default = hints[field.name], getattr(defaults, field.name)
        if dataclasses.is_dataclass(hint):
            first = (hint.__doc__ or "").splitlines()[0]
            group = parser.add_argument_group(f"{field.name}: {first}")
            _add(group, hint, default, f"{field.name}.")  # type: ignore[arg-type]
            continue
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{docs[field.name]} (default: {shown})" if shown != "" else docs[field.name]
        parser.add_argument(
            f"--{prefix}{field.name}",
            help=text.replace("%", "%%"),
            default=argparse.SUPPRESS,
            **_kind(hint),
        )


def _kind(hint: Any) -> dict[str, Any]:
    """Translate a type into argparse's terms."""
    origin = typing.get_origin(hint)
    if hint is bool:
        return {"type": _boolean, "metavar": "{true,false}"}
    if origin is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return {"nargs": "*", "type": item, "metavar": item.__name__.upper()}
    if origin is types.UnionType:
        raise TypeError(f"expected a plain type for a flag, found {hint}")
    return {"type": hint, "metavar": hint.__name__.upper()}


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text == "true"


def apply_flags(config: Config, arguments: argparse.Namespace) -> Config:
    """Return the config with the flags that were given put in; everything is checked again."""
    top: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name, value in vars(arguments).items():
        group, _, inner = name.partition(".")
        if group not in names:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if inner:
            nested.setdefault(group, {})[inner] = value
        else:
            top[group] = value
    for group, values in nested.items():
        top[group] = dataclasses.replace(getattr(config, group), **values)
    return dataclasses.replace(config, **top)  # type: ignore[type-var]
