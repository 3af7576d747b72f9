"""Triton's interpreter, without work that it repeats: it then takes half the time.

Whenever a kernel calls a device function, the interpreter looks at every name of `triton.language` and replaces the
builtins, which the launch of the kernel has replaced already. Here the launch alone does so.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Device functions of a launch find what the launch has patched. Nothing happens where the interpreter is built in
    another way than the one this was written for."""
    patch = getattr(interpreter, "_patch_lang", None)
    if not hasattr(interpreter, "_LangPatchScope") or hasattr(patch, "__wrapped__"):
        return
    patched: list[Any] = []  # the modules whose builtins are replaced at the moment

    @functools.wraps(patch)
    def patch_lang(fn: Any) -> Any:
        names = {id(value): value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if names and all(any(value is one for one in patched) for value in names.values()):
            return None  # a device function: who calls it has no use for a scope
        scope = patch(fn)
        restore = scope.restore
        patched.extend(names.values())

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang
