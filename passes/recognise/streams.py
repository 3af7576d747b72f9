"""Recognise the residual stream: the chain of norms whose hidden states could be held in either layout. Reads only.

A stage is a norm over

    h = addend + residual [+ bias]

whose addend carries a group: an all-reduced sum over the attention group, a sum scattered over it, or own rows that
were gathered over it. Stages of one group follow one another along the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from tpfuse._torch_private import operator_full_name

from ..facts import aten_ops as ops
from ..facts.collectives import Collective, is_collective
from ..facts.graph import is_call, last_dim, region_between, same_shape, same_size, val, value, why_unusual
from ..facts.refusals import Code, Refusal, refused
from ..verdict.accounting import origin
from .known import Known
from .norms import Norm
from .sites import hidden_of
from .sums import Sum, Term, decompose

CUT_ROWS, TRIM_ROWS = "tpfuse::cut_rows", "tpfuse::trim_rows"


@dataclass(frozen=True)
class Addend:
    """What a stage adds to the residual.

    kind: "owed" (an all-reduce pays it), "gathered" (own rows, gathered), "scattered" (a reduce-scatter pays it; the
    stage works on own rows). leaf: the node whose value is added; source: the partial tensor, or the own rows.
    """

    kind: str
    leaf: fx.Node
    source: fx.Node
    collective: Collective


@dataclass(frozen=True)
class StreamStage:
    """One norm of the chain. `previous` is the index of the stage whose hidden states are the residual, or None.

    cuts: readers of the normed value that take the own rows of it; gathers: all-gathers that follow it (over the
    replicas' group in the full form, over the attention group in the scattered form). read_as_is: whether anything else
    reads it, in the layout it is written in. problem: why the stage keeps that layout, or None; the stages behind it
    take its hidden states as they are.
    """

    norm: Norm
    hidden: fx.Node
    total: Sum
    addend: Addend
    term: Term
    previous: int | None
    cuts: tuple[fx.Node, ...]
    gathers: tuple[Collective, ...]
    read_as_is: bool
    problem: Refusal | None = None

    @property
    def scattered_form(self) -> bool:
        return self.addend.kind == "scattered"

    @property
    def vectors(self) -> tuple[Term, ...]:
        """What is added alike to every row: biases."""
        return tuple(term for term in self.total.replicated if term.is_row_vector_of(self.hidden))

    @property
    def residuals(self) -> tuple[Term, ...]:
        """What else is added: the residual stream, and values of its shape or broadcast to it."""
        return tuple(term for term in self.total.replicated if not term.is_row_vector_of(self.hidden))

    @property
    def clonable(self) -> bool:
        """Whether the steps can be repeated on other rows: views have their sizes written into them."""
        chain = self.total.interior | region_between(self.norm.output, {self.hidden})
        return not any(is_call(node, ops.VIEWS) for node in chain)


@dataclass(frozen=True)
class Stream:
    """The stages of one group, in graph order. left: why some of them keep their layout, by the name of each collective
    that they pay."""

    stages: list[StreamStage]
    left: dict[str, Refusal]


NO_STREAM = Stream([], {})


def calls(node: object, name: str) -> bool:
    """Whether `node` calls the operator called `name`."""
    target = getattr(node, "target", None)
    return getattr(node, "op", "") == "call_function" and operator_full_name(target) == name


def moves_rows(graph: fx.Graph) -> bool:
    """Whether rows are cut or scattered anywhere in the graph: without, there is only one layout."""
    return any(
        calls(node, CUT_ROWS) or (is_collective(node) and "reduce_scatter" in operator_full_name(node.target))
        for node in graph.nodes
    )


def find_streams(known: Known, rank: int) -> dict[tuple[int, ...], Stream]:
    """The streams of every group that pays sums before norms."""
    collectives, norms = known.collectives, known.norms
    groups = dict.fromkeys(c.ranks for c in collectives if c.ranks and rank in c.ranks and len(c.ranks) > 1)
    found = {}
    for ranks in groups:
        addends = {a.leaf: a for c in collectives if c.ranks == ranks and (a := _addend(c)) is not None}
        found[ranks] = _stream(norms, addends, collectives, ranks, rank)
    return found


def _addend(collective: Collective) -> Addend | None:
    wait = collective.wait
    if collective.problem or wait is None:
        return None
    if collective.kind == "all_reduce":
        return Addend("owed", wait, collective.input, collective) if collective.reduce_op.lower() == "sum" else None
    if collective.kind == "reduce_scatter" and collective.reduce_op.lower() == "sum":
        return Addend("scattered", wait, collective.input, collective)
    rows = value(wait)
    if collective.kind == "all_gather" and rows is not None and rows.dim() == 2:
        trims = [user for user in wait.users if calls(user, TRIM_ROWS)]
        readers = [user for user in wait.users if user.target is not ops.aten.sym_size.int]
        leaf = trims[0] if len(trims) == 1 and len(readers) == 1 else wait
        return Addend("gathered", leaf, collective.input, collective)
    return None


def _stream(
    norms: Sequence[Norm],
    addends: dict[fx.Node, Addend],
    collectives: Sequence[Collective],
    ranks: tuple[int, ...],
    rank: int,
) -> Stream:
    stages: list[StreamStage] = []
    left: dict[str, Refusal] = {}
    hidden_at: dict[fx.Node, int] = {}
    taken: set[fx.Node] = set()
    for norm in norms:
        hidden = hidden_of(norm, set(addends))
        total = decompose(hidden, set(addends) - taken, set(hidden_at))
        if hidden in hidden_at or not total.owed:
            continue
        if any(why_unusual(node, "") for node in (hidden, norm.output, *(term.leaf for term in total.terms))):
            continue
        term = total.owed[0]
        addend = addends[term.leaf]
        links = [hidden_at[t.leaf] for t in total.replicated if t.leaf in hidden_at]
        previous = links[0] if len(links) == 1 else None
        readers = _readers(norm, addend, collectives, ranks, rank)
        stage = StreamStage(norm, hidden, total, addend, term, previous, *readers)
        stage = replace(stage, problem=_no_line(stage) or refused(Code.BETWEEN, _unfit(stage, len(ranks))))
        if stage.problem is not None:
            left |= {origin(addends[t.leaf].collective.node): stage.problem for t in total.owed}
        taken |= {t.leaf for t in total.owed}
        hidden_at[hidden] = len(stages)
        stages.append(stage)
    return Stream(stages, left)


def _no_line(stage: StreamStage) -> Refusal | None:
    """Why the hidden states are not one collective's result and a residual, or None."""
    total = stage.total
    problem = refused(Code.NORM, stage.norm.problem) or refused(Code.BETWEEN, total.problem)
    if problem is not None:
        return problem
    if len(total.owed) > 1:
        return Refusal(Code.APART, "two collectives meet before its norm")
    if not total.plain:
        said = "a multiplication, a mask or a choice of rows stands between the collective and the norm"
        return Refusal(Code.BETWEEN, said)
    return None


def _unfit(stage: StreamStage, parts: int) -> str:
    """Why the stage cannot change its layout, or ''.

    Rows are cut from the flattened hidden states, so whatever is added to own rows must come in the same order and
    have one row for each; and nothing else may read the steps in between, since they are repeated on own rows.
    """
    hidden, addend, inside = stage.hidden, stage.addend, stage.total.interior
    alone = addend.leaf is hidden  # the sum itself is the hidden state; whatever reads it is handed the rows it wants
    readers = [] if addend.kind == "scattered" or alone else [u for u in addend.leaf.users if not _is_size(u)]
    if any(user not in inside for user in readers):
        return f"something besides the addition before the norm reads the result of the {addend.collective.kind}"
    if any(user not in inside for node in inside if node is not hidden for user in node.users):
        return "something besides the norm reads a value that stands between the collective and the norm"
    if addend.kind == "gathered" and stage.previous is None:
        return "the residual it is added to belongs to no boundary of the same ranks"
    for term in stage.residuals:
        if term.scale != 1.0:
            return "the residual is multiplied by a number before the norm"
        if not term.only_reshapes or not same_size(last_dim(term.joins or term.leaf), last_dim(hidden)):
            return "the residual is rearranged between its addition and the norm"
        if addend.kind == "scattered" and not same_shape(term.leaf, term.joins or hidden):
            return "a value is broadcast over the rows when it is added before the norm"
    if addend.kind == "gathered" and not _gathers_own_rows(stage, parts):
        return "the gathered rows are rearranged, or some of them dropped, before the norm"
    between = region_between(stage.norm.output, {hidden})
    if any(is_call(node, ops.REORDERINGS) for node in between):
        return "the hidden states are rearranged inside the norm"
    if any(user not in between and user.users for node in between - {stage.norm.output} for user in node.users):
        return "something besides the norm reads its statistics"
    return ""


def _gathers_own_rows(stage: StreamStage, parts: int) -> bool:
    """Whether what is gathered is this rank's own rows of the hidden states, the last ranks' padded."""
    term, source = stage.term, stage.addend.source
    if not term.only_reshapes or not same_size(last_dim(source), last_dim(stage.hidden)):
        return False
    rows, own = flat_rows(stage.hidden), val(source).shape[0]
    return same_size(own * parts, rows) or same_size(own, (rows + parts - 1) // parts)


def flat_rows(node: fx.Node) -> Any:
    """The number of rows of `node`, a number or a symbol: its sizes but the last, multiplied."""
    rows: Any = 1
    for size in val(node).shape[:-1]:
        rows = rows * size
    return rows


def _is_size(node: fx.Node) -> bool:
    return node.target in (ops.aten.sym_size.int, ops.aten.sym_numel.default, ops.aten.sym_stride.int)


def _readers(
    norm: Norm, addend: Addend, collectives: Sequence[Collective], ranks: tuple[int, ...], rank: int
) -> tuple[tuple[fx.Node, ...], tuple[Collective, ...], bool]:
    """The cuts and the gathers that read the normed rows, seen through views that keep every row as it is; and whether
    anything else does."""
    by_node = {c.node: c for c in collectives if c.kind == "all_gather" and not c.problem and c.wait is not None}
    cuts: list[fx.Node] = []
    gathers: list[Collective] = []
    others = False
    pending = [norm.output]
    while pending:
        for user in pending.pop().users:
            if is_call(user, ops.VIEWS - ops.REORDERINGS) and same_size(last_dim(user), last_dim(norm.output)):
                pending.append(user)
            elif calls(user, CUT_ROWS) and user.args[1:] == (len(ranks), ranks.index(rank)):
                cuts.append(user)
            elif user in by_node and (by_node[user].ranks == ranks) == (addend.kind == "scattered"):
                gathers.append(by_node[user])
            elif not _is_size(user):
                others = True
    return tuple(cuts), tuple(gathers), others


def divides(parts: int, size: object) -> bool:
    """Whether `size` (a number or a symbolic size) is a multiple of `parts` for certain."""
    if isinstance(size, int):
        return size % parts == 0
    expression = getattr(getattr(size, "node", None), "expr", None)
    return expression is not None and (expression / parts).is_integer is True


__all__ = ["Addend", "Stream", "StreamStage", "calls", "divides", "find_streams", "flat_rows"]
