"""Dynamo: what it compiles now, what ends a graph, and how an error gets through it."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .tensors import tensor_leaves


def torch_compile_parameters() -> set[str]:
    """The names of torch.compile's own parameters, which it may hand on to a backend."""
    return set(inspect.signature(torch.compile).parameters)


def compiling(frame: types.FrameType | None) -> bool:
    """Whether a thread that stands at `frame` is inside torch.compile's compiler.

    If `convert_frame` moves: answer False; a message then says less about a peer.
    """
    while frame is not None:
        if frame.f_code.co_filename.endswith("_dynamo/convert_frame.py"):
            return True
        frame = frame.f_back
    return False


def raised_through_dynamo(error: Exception) -> Exception:
    """`error` as an exception that Dynamo does not wrap into BackendCompilerFailed, and that is still an instance of
    `error`'s class.

    If `ShortenTraceback` goes: return `error`; users then find it as `BackendCompilerFailed.inner_exception`.
    """
    try:
        from torch._dynamo.exc import ShortenTraceback
    except ImportError:
        return error
    kind = type(error)

    def init(self: Any, *args: Any) -> None:
        Exception.__init__(self, *args)
        self.first_useful_frame = None

    unwrapped = type(kind.__name__, (kind, ShortenTraceback), {"__init__": init, "__module__": kind.__module__})
    raised = unwrapped(*error.args)
    raised.__dict__.update(error.__dict__)
    raised.__cause__ = error.__cause__
    return raised


@dataclass(frozen=True)
class GraphBreak:
    """A place at which Dynamo could not go on. reason: its own words, several lines; place: `file:line in function`."""

    reason: str
    place: str


def ending_break(gm: fx.GraphModule) -> GraphBreak | None:
    """The graph break that ended a Dynamo graph; None where it ended with its function.

    If `compile_subgraph_reason` goes: None, and reports say nothing about breaks.
    """
    return _as_break(getattr(gm, "compile_subgraph_reason", None))


def breaks_since(known: int) -> tuple[list[GraphBreak], int]:
    """The graph breaks of this process from number `known` on, and how many there are now; Dynamo forgets them at
    `torch.compiler.reset`, and counting begins anew.

    If `graph_break_reasons` goes: none, as for `ending_break`.
    """
    try:
        from torch._dynamo.utils import graph_break_reasons
    except ImportError:
        return [], 0
    new = graph_break_reasons[known if known <= len(graph_break_reasons) else 0 :]
    return [found for reason in new if (found := _as_break(reason)) is not None], len(graph_break_reasons)


def _as_break(reason: Any) -> GraphBreak | None:
    if not getattr(reason, "graph_break", False):
        return None
    stack = getattr(reason, "user_stack", None) or ()
    own = [frame for frame in stack if not frame.filename.startswith(_NO_PROGRAM) and not _of_python(frame.filename)]
    own = own or [frame for frame in stack if frame.filename != contextlib.__file__]
    frame = own[-1] if own else None
    place = f"{frame.filename}:{frame.lineno} in {frame.name}" if frame is not None else ""
    return GraphBreak(str(getattr(reason, "reason", "")).strip(), place)


def callers() -> tuple[list[str], list[str], GraphBreak | None]:
    """The program's own functions on the stack while Dynamo compiles, innermost first: those that were to be compiled
    and run outside of any graph, and the forwards of modules that call what was compiled; and why Dynamo could not
    compile the innermost of the former of which that is known.

    If `compile_wrapper` goes: ([], [], None), and reports say less about what is around a graph.
    """
    frames: list[tuple[types.FrameType, bool]] = []
    outermost = 0
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.endswith("_dynamo/eval_frame.py") and frame.f_code.co_name == "compile_wrapper":
            outermost = len(frames)
        elif name.endswith("nn/modules/container.py") or not name.startswith((*_NO_PROGRAM, "<")):
            frames.append((frame, "forward" in frame.f_code.co_name))
        frame = frame.f_back
    inside = [_where(frame) for frame, _ in frames[:outermost]]
    codes = [(frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_code.co_name) for frame, _ in frames]
    reasons = dict(given_up()) if outermost else {}
    why = next((reasons[code] for code in codes[:outermost] if code in reasons), None)
    return inside, [_where(frame) for frame, is_forward in frames[outermost:] if is_forward], why


def given_up() -> list[tuple[tuple[str, int, str], GraphBreak]]:
    """The functions that Dynamo could not compile at all, oldest first, as (file, first line, name), and why: a break
    in a loop, an exception in what it traced.

    If `get_compilation_metrics` goes: none, and notes name what the usual reasons are.
    """
    try:
        from torch._dynamo.utils import get_compilation_metrics
    except ImportError:
        return []
    found: list[tuple[tuple[str, int, str], GraphBreak]] = []
    for tried in get_compilation_metrics():
        code: Any = tuple(getattr(tried, name, None) for name in ("co_filename", "co_firstlineno", "co_name"))
        reason = str(getattr(tried, "fail_reason", None) or "").strip()
        if reason and None not in code:
            file = str(getattr(tried, "fail_user_frame_filename", None) or "")
            line = getattr(tried, "fail_user_frame_lineno", None)
            place = "" if not file or file.startswith(_NO_PROGRAM) else f"{file}:{line}"
            found.append((code, GraphBreak(reason, place)))
    return found


def path_of_compiled() -> tuple[str, bool]:
    """Where the module whose forward Dynamo compiles stands in the module that was given to `torch.compile`, as
    `named_modules` has it ('' for that module itself, and where that is not known); and whether FSDP2 wraps one of
    them, whose hooks Dynamo does not trace.

    If `InstructionTranslator.current_tx` goes: ('', False), and names begin at the module that is compiled.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        now = InstructionTranslator.current_tx()
        here = now.f_locals.get(next(iter(now.f_code.co_varnames), ""))
    except (ImportError, AttributeError):
        return "", False
    given: list[torch.nn.Module] = []
    inside: list[torch.nn.Module] = []
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        name, owner = frame.f_code.co_filename, frame.f_locals.get("self")
        if name.endswith("_dynamo/eval_frame.py") and frame.f_code.co_name == "compile_wrapper":
            given += inside
            inside = []
        elif isinstance(owner, torch.nn.Module):
            inside.append(owner)
        frame = frame.f_back
    sharded = any(type(module).__name__.startswith("FSDP") for module in (*given, here))
    if not given or not isinstance(here, torch.nn.Module):
        return "", sharded
    return next((name for name, module in given[-1].named_modules() if module is here), ""), sharded


def _where(frame: types.FrameType) -> str:
    code = frame.f_code
    name = getattr(code, "co_qualname", code.co_name)
    return f"{name} ({code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno})"


#: Files whose functions are not the program's.
_NO_PROGRAM = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), str(Path(contextlib.__file__)))


#: Where Python's own modules are; packages may be installed below it.
_PYTHON = str(Path(contextlib.__file__).parent)


def _of_python(file: str) -> bool:
    """Whether a file belongs to Python's library, or to the package that brings newer parts of it to older Pythons."""
    installed = "site-packages" in file or "dist-packages" in file
    return file.endswith("/typing_extensions.py") or (file.startswith(_PYTHON) and not installed)


def compiled_wrapper() -> type | None:
    """The class of what `torch.compile(module)` returns.

    If `OptimizedModule` goes: None, and nothing is said of wrappers that were never called.
    """
    try:
        from torch._dynamo.eval_frame import OptimizedModule
    except ImportError:
        return None
    return OptimizedModule


def backend_of(wrapper: Any) -> str:
    """The module that the backend of a compiled wrapper comes from, by its first part; '' if unknown."""
    seen, found = set(), getattr(getattr(wrapper, "dynamo_ctx", None), "callback", None)
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        compiler = getattr(found, "compiler_fn", None)
        if compiler is not None or getattr(found, "__module__", "").split(".")[0] == "tpfuse":
            return str(getattr(compiler or found, "__module__", "")).split(".")[0]
        found = getattr(found, "_torchdynamo_orig_backend", None) or getattr(found, "_torchdynamo_orig_callable", None)
    return ""


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Leave `text()` in torch's structured trace (TORCH_TRACE), for tlparse; it is not called without one.

    If `trace_structured` goes: nothing is left.
    """
    try:
        from torch._logging import trace_structured
    except ImportError:
        return
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def held_numbers(gm: fx.GraphModule) -> dict[str, tuple[str, float]]:
    """The floats that modules hold and that Dynamo made symbolic in this graph, as it does under `dynamic=True`: where
    the program reads each, its symbol and its value.

    If a symbolic float comes in another way than as a tensor with `item_memo`: none, and what is multiplied by one
    stays behind its sum.
    """
    found = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        number = getattr(node.meta.get("example_value"), "item_memo", None)
        source = getattr(node.meta.get("grapharg"), "source", None)
        if not isinstance(number, torch.SymFloat) or source is None or number.node.hint is None:
            continue
        kind, name = (one() if callable(one) else one for one in (source.guard_source, source.name))
        symbol = getattr(getattr(number.node, "_expr", None), "name", "")
        if symbol and "NN_MODULE" in getattr(kind, "name", ""):
            found[name] = symbol, float(number.node.hint)
    return found


def trace_again_with_constants(symbols: Sequence[str]) -> None:
    """Raise what lets Dynamo trace the program once more with these symbolic floats as constants, each with a guard.

    If `TensorifyState` goes: nothing is raised, and they stay symbolic.
    """
    try:
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis
        from torch._dynamo.symbolic_convert import TensorifyState
    except ImportError:
        return
    for symbol in symbols:
        TensorifyState.specialize(symbol)
    raise TensorifyScalarRestartAnalysis


def symbolic_again(symbols: Sequence[str]) -> None:
    """Undo what `trace_again_with_constants` told Dynamo: it goes by names, which other graphs have as well.

    If `TensorifyState` goes: nothing is undone, and nothing was told.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch._dynamo.symbolic_convert import TensorifyState

        TensorifyState.force_specializations.difference_update(symbols)


def compilation() -> tuple[int | None, int]:
    """(the number of the piece of code that Dynamo compiles now, how many times it has compiled it before).

    If `CompileContext` goes: (None, 0), and every compilation counts as one of new code.
    """
    from torch._guards import CompileContext

    number = CompileContext.current_compile_id()
    if number is None or number.frame_id is None:
        return None, 0
    return number.frame_id, number.frame_compile_id or 0


def compiled_codes() -> tuple[tuple[str, int, str], ...]:
    """What Dynamo compiles now, and the compiled code that it was called from, innermost first: (file, first line,
    name) of each as the user wrote it; the rest of a function behind a graph break counts as that function.

    If these tables of Dynamo's go: less is known of where a graph comes from, and () is nothing at all.
    """
    try:
        from torch._dynamo.convert_frame import output_codes
        from torch._dynamo.resume_execution import ContinueExecutionCache
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._dynamo.utils import orig_code_map

        resumed = ContinueExecutionCache.generated_code_metadata
        codes = [InstructionTranslator.current_tx().f_code]
    except (ImportError, AttributeError):
        return ()
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in output_codes:
            codes.append(frame.f_code)
        frame = frame.f_back
    found = []
    for code in codes:
        for _ in range(8):  # the rest of a rest of a function
            written = orig_code_map.get(code, code)
            written = resumed[written].code if written in resumed else written
            if written is code:
                break
            code = written
        found.append((code.co_filename, code.co_firstlineno, code.co_name))
    return tuple(dict.fromkeys(found))


def restarts_tracing() -> type[Exception]:
    """What torch raises while it compiles a graph to have Dynamo trace the program once more, with a number that was
    symbolic as a constant; only while Dynamo compiles does somebody catch it.

    If `TensorifyScalarRestartAnalysis` goes: a class that nobody raises.
    """
    try:
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    except ImportError:
        return type("NeverRaised", (Exception,), {})
    return TensorifyScalarRestartAnalysis


def _told_constant() -> set[str]:
    """The symbols that Dynamo has been told to trace as constants in the compilation that is under way: its own set.

    If `TensorifyState` goes: an empty one, and nothing is remembered.
    """
    try:
        from torch._dynamo.symbolic_convert import TensorifyState

        return TensorifyState.force_specializations
    except (ImportError, AttributeError):
        return set()


def tracing_again(inputs: Sequence[Any]) -> Callable[[], AbstractContextManager]:
    """Called while Dynamo has a graph with these inputs compiled: what makes a later compilation of that graph see the
    same symbols for its sizes and numbers. Without it a graph of symbolic sizes fits those of its first inputs alone.
    It holds Dynamo's lock: tracing patches what other threads' tracing patches too.

    Numbers that Dynamo was told to trace as constants are so again: it forgets them once a compilation is over, and a
    compiler that meets their symbols unprepared wants the program traced once more, which nobody does then.

    If `TracingContext` goes: graphs that ranks do not agree on would have to be compiled once for each size. If
    `compile_lock` goes: a lock of our own, taken here and in the backend. If `TensorifyState` goes: nothing is
    remembered.
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode

    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return lambda: compile_lock
    # Dynamo empties the context once it has what it compiled.
    known = [(t, context.tensor_to_context[t]) for t in tensor_leaves(inputs) if t in context.tensor_to_context]
    shapes = context.fake_mode.shape_env
    constant = set(_told_constant())

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        anew = TracingContext(FakeTensorMode(shape_env=shapes))
        for tensor, symbols in known:
            anew.tensor_to_context[tensor] = symbols
        with compile_lock, tracing(anew):
            told = _told_constant()
            new = constant - told
            told |= new
            try:
                yield
            finally:
                told -= new

    return again
