"""Triton's interpreter, which prepares its language once a launch."""

from typing import Any

from triton.runtime import interpreter


def patch_language_once() -> None:
    """Prepare for a module's functions once a launch, not at each call from within a kernel.

    Triton puts what it interprets in the place of its language's functions, of which each `tl.sum`
    looks for all anew: most of a kernel's time.
    """
    prepared: set[int] = set()
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()  # a launch takes back, as it ends, what was put there for its kernel
        launch(self, *args, **kwargs)

    def patched(function: Any) -> Any:
        names = id(function.__globals__)
        if names in prepared:
            return interpreter._LangPatchScope()
        prepared.add(names)
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, patched
