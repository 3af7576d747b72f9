"""Triton's interpreter, without work that nobody uses: it then takes half the time.

Whenever a kernel calls a device function, the interpreter looks at every name of `triton.language` and replaces the
builtins, which the launch of the kernel has replaced already. Here the launch alone does so. It also computes, for each
sum of integers, whether it overflows, and asserts it in debug mode only.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

from tpfuse.kernels.words import SENTINEL

#: Seconds between two looks at a word that has not come.
POLL = 2e-3


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


def check_overflow_in_debug_mode_only() -> None:
    options = getattr(interpreter.interpreter_builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def rest_between_polls() -> None:
    """Kernels that wait for a word leave the processor to the rank that sends it."""
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def create_masked_load(self: Any, *args: Any) -> Any:
        words = load(self, *args)
        if args[-1] and (words.data == SENTINEL).any():  # volatile
            time.sleep(POLL)
        return words

    builder.create_masked_load = create_masked_load


def rewrite_all() -> None:
    """What the interpreter makes of each function's source, here and not in every fork."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tpfuse.kernels"):
            for value in list(vars(module).values()):
                if isinstance(value, interpreter.InterpretedFunction):
                    value.rewrite()
