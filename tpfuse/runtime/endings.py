"""What ends a compiled graph: graph breaks and nested regions, in words, for the notes and reasons of its report.

The pass sees a graph and not what is around it. Dynamo does, and says so while it compiles: why a graph ends, where in
the program, and whose forward runs outside of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from .. import _state as state
from .. import _torch_private as private
from .._torch_private import GraphBreak
from ..passes.facts.refusals import Code
from ..report import Report

_BRANCH = "torch.where or torch.cond keep the branch in the graph; behind the norm it leaves the boundary fusible"
#: What to do about breaks that stand in well-known places, by a word of Dynamo's reason.
_ADVICE = (
    ("mark_dirty", "write the function without mark_dirty: return a new tensor, as "
     "torch.distributed._functional_collectives.all_reduce(x, 'sum', group) does"),
    ("async_op", "call the collective without async_op=True, or torch.distributed._functional_collectives.all_reduce, "
     "which waits only where its result is read"),
    ("builtin `print`", "torch._dynamo.config.reorderable_logging_functions.add(print) keeps it out of the way"),
    ("can't actually be reordered", "torch._dynamo.config.ignore_logging_functions.add(...) with that function leaves "
     "it out of compiled code (in older torch it is called ignore_logger_methods)"),
    ("warnings.warn", "torch._dynamo.config.reorderable_logging_functions.add(warnings.warn) keeps it out of the way"),
    ("Reorderable", "torch._dynamo.config.reorderable_logging_functions.add(...) with that function keeps it out of "
     "the way"),
    ("torch.distributed.nn.functional", "call torch.distributed._functional_collectives.all_reduce(x, 'sum', group) or "
     "its like, which has a gradient too"),
    ("pybind11_object", "make the object outside of compiled code; a collective that compiled code has no form of "
     "(a barrier, a reduction to one rank) belongs outside, too, or is to be its twin in "
     "torch.distributed._functional_collectives, where it has one"),
    ("Python builtin or a third-party", "move the call out of compiled code; where its result is not needed, "
     "torch._dynamo.config.ignore_logging_functions.add(...) with that function leaves it out, and a function of an "
     "extension that computes tensors can be made an operator (torch.library.custom_op)"),
    ("Data-dependent branching", _BRANCH),
    ("generic_jump", _BRANCH),
)  # fmt: skip
#: Of Dynamo's hints, those to torch's developers.
_FOR_TORCH = ("file an issue", "report an issue", "It may be possible to write Dynamo tracing rules")


@dataclass(frozen=True)
class Surroundings:
    """What is around a graph that Dynamo hands over.

    ending: the break that ends it, or None. before: other breaks since the last graph. outside: functions that were to
    be compiled and call this graph from outside of any; skipped: why Dynamo could not compile them, where that is
    known. callers: forwards of modules that call what was compiled.
    regions: places of nested compile regions with collectives. path: where the module that is compiled stands in the
    one that was to be; sharded: whether FSDP2 wraps it.
    """

    ending: GraphBreak | None = None
    before: Sequence[GraphBreak] = field(default=())
    outside: Sequence[str] = field(default=())
    skipped: GraphBreak | None = None
    callers: Sequence[str] = field(default=())
    regions: Sequence[str] = field(default=())
    path: str = ""
    sharded: bool = False


_SKIPPED = (
    "Dynamo broke or skipped it (a break inside a loop, a hook that it does not trace, a disabled function; "
    "TORCH_LOGS=graph_breaks says more)"
)
_SHARDED = (
    "FSDP2 wraps modules inside it, and Dynamo does not trace FSDP2's hooks: each wrapped module is compiled by "
    "itself; with fully_shard on the whole model alone it is one graph"
)
#: The function around the module in DistributedDataParallel's forward; the module is one graph all the same.
_OF_DDP = "DistributedDataParallel._inside_ddp_forward"
#: How many breaks before a graph its report names.
_NOTED = 3


def surroundings(gm: fx.GraphModule) -> Surroundings:
    """To be asked while Dynamo compiles `gm`, once for each graph."""
    ending = private.ending_break(gm)
    with state.LOCK:
        new, state.BREAKS.named = private.breaks_since(state.BREAKS.named)
    new = [found for found in new if _OF_DDP not in found.reason]
    outside, callers, skipped = private.callers()
    if ending is not None:  # of two words on one place the longer one explains it
        ending = max([found for found in new if found.place == ending.place] or [ending], key=lambda b: len(b.reason))
    before = tuple(found for found in new if ending is None or found.place != ending.place)
    path, sharded = private.path_of_compiled()
    before = before[-_NOTED:]
    return Surroundings(ending, before, tuple(outside), skipped, tuple(callers), _regions(gm), path, sharded)


def unnamed_breaks() -> list[GraphBreak]:
    """Graph breaks that no report names, since no graph followed them."""
    return private.breaks_since(state.BREAKS.named)[0]


def with_surroundings(report: Report, around: Surroundings) -> Report:
    """The report with notes on what ends the graph, and reasons that say so."""
    boundaries = [
        replace(b, reason=f"{b.reason}; {_beyond(around)}") if b.code == Code.LEAVES else b for b in report.boundaries
    ]
    if around.path:
        boundaries = [replace(b, module=".".join(filter(None, (around.path, b.module)))) for b in boundaries]
    return replace(
        report,
        boundaries=boundaries,
        notes=list(dict.fromkeys([*report.notes, *_notes(around)])),
    )


def _beyond(around: Surroundings) -> str:
    if around.ending is not None:
        return f"a graph break ends the graph at {_short(around.ending.place)}, see the notes of the report"
    if around.regions:
        return "a nested compile region is a graph of its own, see the notes of the report"
    if around.outside:
        return f"{around.outside[0]} calls this graph and runs outside of any, because Dynamo broke or skipped it"
    if around.callers:
        return (
            f"{around.callers[0]} calls it and is not compiled: where the norm follows there, compile the whole model "
            "instead of each block"
        )
    return "a norm that follows it in code outside can only be fused if both are compiled together"


def _notes(around: Surroundings) -> Iterable[str]:
    if around.ending is not None:
        yield (
            f"a graph break ends this graph at {around.ending.place}, and what follows is in another one, so no "
            f"boundary is fused across it: {in_words(around.ending)}"
        )
    for found in dict.fromkeys(around.before):
        yield f"a graph break stands before this graph{found.place and ', at '}{found.place}: {in_words(found)}"
    if around.outside and around.ending is None and not around.before:
        yield (
            f"this graph is a part of what was to be compiled: {' ← '.join(around.outside[:4])} runs outside of any "
            f"graph, because {_SHARDED if around.sharded else _why_skipped(around.skipped)}"
        )
    for region in around.regions:
        yield (
            f"{region} is a nested compile region: a graph of its own, compiled once for all its calls, so a sum "
            "inside it and a norm outside, or the reverse, are not fused; called without nested_compile_region they are"
        )


def _why_skipped(found: GraphBreak | None) -> str:
    if found is None:
        return _SKIPPED
    return f"Dynamo could not compile it{found.place and ', for what stands at '}{found.place}: {in_words(found)}"


def in_words(found: GraphBreak) -> str:
    """Dynamo's reason, its explanation, and what to do."""
    reason = found.reason.replace(" (e.g. _warnings.warn)", "")  # an example that Dynamo gives of any built-in function
    lines = [re.sub(r" at 0x[0-9a-f]+", "", line.strip()) for line in reason.splitlines()]
    if lines[:1] and lines[0].startswith("generic_jump"):
        lines[0] = f"a branch on the value of a tensor (Dynamo's {lines[0]})"
    said = [line for line in lines[:1] if line]
    if lines[:1] == ["Observed exception"]:
        raised = [line.partition("raised exception")[2].strip() for line in lines if "raised exception" in line]
        lines = [f"an exception: {raised[0]}" if raised else lines[0], *(line for line in lines if "Hint:" in line)]
        said = lines[:1]
    said += [line.removeprefix("Explanation:").strip() for line in lines if line.startswith("Explanation:")]
    hints = [line.removeprefix("Hint:").strip() for line in lines if line.startswith("Hint:")]
    hints = [hint for hint in hints if not any(word in hint for word in _FOR_TORCH)] or ["keep it out of compiled code"]
    advice = next((what for word, what in _ADVICE if word in reason), hints[0])
    sentences = [part.rstrip(".") for part in [*said, f"what to do: {advice}" if advice else ""] if part]
    return ". ".join(dict.fromkeys(sentences)) or "Dynamo gives no reason"


def _short(place: str) -> str:
    return place.rsplit("/", 1)[-1]


def _regions(gm: fx.GraphModule) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for node in gm.graph.nodes:
        if "invoke_subgraph" in str(node.target) and node.args and isinstance(node.args[0], fx.Node):
            inner = getattr(gm, str(node.args[0].target), None)
            if isinstance(inner, fx.GraphModule) and any("all_reduce" in str(n.target) for n in inner.graph.nodes):
                found.setdefault(f"{node.args[0].target}, called {_line(node)},".replace(" ,", ","))
    return tuple(found)


def _line(node: fx.Node) -> str:
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    places = [line.strip() for line in trace if line.strip().startswith("File ")]
    return f"at {_short(places[-1].split(chr(34))[1])}:{places[-1].split('line ')[1].split(',')[0]}" if places else ""
