"""Triton's interpreter without what it repeats: it patches its language anew in every call of a device function, a third of a test's time."""

import inspect
from typing import Any

from triton import language
from triton.runtime import interpreter

LANGUAGES = (language, language.core)


def patch_once_per_launch() -> None:
    """The language stays patched from the launch on, until the launch restores it; releases that work otherwise are left alone."""
    names = ("GridExecutor", "_LangPatchScope", "_patch_lang")
    if not all(hasattr(interpreter, name) for name in names):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    running: list[set[str]] = []  # per launch, the languages that are patched

    def patched(fn: Any) -> Any:
        seen = {value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value) and value in LANGUAGES}
        if running and seen <= running[-1]:
            return interpreter._LangPatchScope()
        if running:
            running[-1] |= seen
        return patch(fn)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        running.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            running.pop()

    interpreter._patch_lang = patched
    interpreter.GridExecutor.__call__ = launched
