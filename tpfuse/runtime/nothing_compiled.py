"""Why no graph was compiled: what a process without reports can say of itself."""

from __future__ import annotations

import gc
from typing import Any

from torch import nn

from .. import _torch_private as private
from .endings import in_words, unnamed_breaks

_IN_PLACE = (
    "model.generate(...) and other methods call the module underneath such a wrapper, which is not compiled: compile "
    'in place with model.compile(backend="tpfuse"), or hand generate a CompileConfig(backend="tpfuse")'
)


def why_no_reports() -> str:
    """One or two sentences, from the wrappers there are and the graph breaks that Dynamo met."""
    models = wrapped_models()
    breaks = unnamed_breaks() or _given_up(models)
    found = [f"{each.place and f'at {each.place}: '}{in_words(each)}" for each in breaks[:3]]
    if found:
        return f"tpfuse compiled no graph; Dynamo met graph breaks, {'; '.join(found)}"
    if models:
        names = ", ".join(dict.fromkeys(type(m).__name__ for m in models))
        return f"tpfuse compiled no graph: the compiled {names} was never called. {_IN_PLACE}"
    return (
        'tpfuse compiled no graph in this process: nothing that was compiled with backend="tpfuse" was called yet, '
        "or it had no operation that Dynamo could put into a graph"
    )


def wrapped_models() -> list[nn.Module]:
    """The models that `torch.compile(model, backend="tpfuse")` wraps in this process. Walks over all objects: for
    messages only."""
    kind = private.compiled_wrapper()
    found: list[Any] = [w for w in gc.get_objects() if kind is not None and type(w) is kind]
    models = [private.own_modules(w).get("_orig_mod") for w in found if private.backend_of(w) == "tpfuse"]
    return [m for m in models if isinstance(m, nn.Module)]


def _given_up(models: list[nn.Module]) -> list[private.GraphBreak]:
    """Why Dynamo gave up functions; where models are wrapped, forwards of theirs: others say nothing of them."""
    codes = [getattr(type(part).forward, "__code__", None) for model in models for part in model.modules()]
    own = {(code.co_filename, code.co_firstlineno, code.co_name) for code in codes if code is not None}
    return [why for code, why in private.given_up() if not models or code in own]
