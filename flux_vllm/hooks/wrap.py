"""Wrapping a function of vLLM's, or a method of one of its objects."""

import functools
from collections.abc import Callable
from typing import Any

from flux_vllm.errors import UnsupportedConfigurationError


def find(owner: Any, name: str) -> Any:
    """Return a class's or module's own function, as it is stored.

    Raises: UnsupportedConfigurationError: there is no such function.
    """
    found = vars(owner).get(name)
    if found is None:
        raise UnsupportedConfigurationError(
            f"expected a function {name} of {owner.__name__} in vLLM, found none; install a "
            "version of vLLM that flux knows"
        )
    return found


def wrap(owner: Any, name: str, wrapper: Callable, is_classmethod: bool = False) -> None:
    """Replace a function of a class or module by `wrapper(original, ...)`, once.

    Args:
        owner: the class or module.
        name: of the function.
        wrapper: called with the function as it was (bound, for a class method), then with the
            call's own arguments.
        is_classmethod: whether the function is one.

    Raises: UnsupportedConfigurationError: there is no such function.
    """
    found = find(owner, name)
    function = found.__func__ if is_classmethod else found
    if hasattr(function, "__flux_wrapped__"):
        return

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_classmethod:
            return wrapper(functools.partial(function, args[0]), *args[1:], **kwargs)
        return wrapper(function, *args, **kwargs)

    wrapped.__flux_wrapped__ = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def wrap_object(target: Any, name: str, wrapper: Callable) -> None:
    """Replace one object's method by `wrapper(original, ...)`.

    Args:
        target: an object of a flux engine.
        name: of the method.
        wrapper: called with the method as it was, then with the call's own arguments.
    """
    original = getattr(target, name)
    setattr(target, name, functools.wraps(original)(functools.partial(wrapper, original)))
