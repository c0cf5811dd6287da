"""Triton's interpreter patches all of ``triton.language`` again for every call of a device function; once per launch will do."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_per_launch() -> None:
    """What a launch, or a call in it, has patched stays so until that launch ends."""
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    languages: dict[int, frozenset[str]] = {}
    patched: set[frozenset[str]] = set()

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_anew(fn: Any) -> Any:
        scope = fn.__globals__
        if id(scope) not in languages:
            found = (value for value in list(scope.values()) if value is tl or value is tl.core)
            languages[id(scope)] = frozenset(value.__name__ for value in found)
        if languages[id(scope)] in patched:
            return None
        patched.add(languages[id(scope)])
        return patch(fn)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = patch_anew
