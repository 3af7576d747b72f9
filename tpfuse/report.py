"""What happened and why: one verdict for every collective of a compiled graph."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _state as state
from .strict_json import StrictJson


@dataclass(frozen=True)
class Transfer(StrictJson):
    """One collective over the ranks `group`, and the bytes each of them sends (None where a size is unknown)."""

    collective: str
    group: tuple[int, ...]
    bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.collective} {_ranks(self.group)}"


@dataclass(frozen=True)
class Boundary(StrictJson):
    """The verdict on one collective.

    kind: "attention→dense_mlp", "dense_mlp→attention", "embedding→attention", "...→final_norm" and so on, or "unknown".
    module: qualified name of the module that produced the collective's input.
    collective: "all_reduce", "reduce_scatter", "all_gather" or "all_to_all", in whatever form (coalesced, autograd).
        Any other collective of the graph is listed too, never fused, by its operator's name, as "broadcast" is.
    group: the global ranks it runs over.
    norm: "rms_norm", "layer_norm", or None where no norm reads the result.
    rewrite: the rewrite's name, or None.
    fused: whether the collective became part of a fused operation.
    reason: empty when fused; otherwise one sentence a user can act on, whose wording may change at any time.
    code: what kind of reason that is, in one word for programs: a value of `tpfuse.passes.facts.refusals.Code`.
    direction: "forward" or "backward".
    feeds_norm: whether a norm, or what looks like one, reads the result with only row-wise arithmetic in between (what
        `strict` asks about). A value of rows that is multiplied or divided by a root of a statistic over the rows'
        hidden units looks like one, and so does an operator that is called a norm.
    demanded: whether it stays unfused because the policy, as it is declared, asks for that: no fusion is missed.
    runs: how the fused operation will run, for all that is known without asking other ranks: "symmetric memory" (one
        kernel, at sizes for which the dispatch table has one; with overlap_all_reduce_norm named, also what that does
        here) or "functional: <why>"; empty when not fused.
    kernel: whether that is one kernel: `runs` for programs.
    layout_in, layout_out: how the rows lie before and after the boundary as it is performed now: "SCATTERED" (each rank
        holds its share of its replica's rows), "TP_ATTN_FULL" (the rows of its replica) or "FULL" (of every replica);
        empty where the policy does not tell. Where the first collective reduces, what comes in owes it that sum.
    before, after: the collectives as written and as performed now. None after: what the boundary paid is paid, or no
        longer needed, at another one.
    dtype, hidden: of the collective's input, as far as they are known before the graph runs.
    quantised: what the fused operation quantises the normed value to ("FP8 (e4m3) per row"), or nothing; of a gather,
        in which form it gathers rows.
    """

    kind: str
    module: str
    collective: str
    group: tuple[int, ...]
    norm: str | None = None
    rewrite: str | None = None
    fused: bool = False
    reason: str = ""
    direction: str = "forward"
    feeds_norm: bool = False
    demanded: bool = False
    runs: str = ""
    dtype: str = ""
    hidden: int | None = None
    quantised: str = ""
    layout_in: str = ""
    layout_out: str = ""
    before: tuple[Transfer, ...] = ()
    after: tuple[Transfer, ...] = ()
    code: str = ""
    kernel: bool = False

    @property
    def bytes_before(self) -> int | None:
        """Bytes each rank sends as the graph was written; None where a size is unknown."""
        return _total(self.before)

    @property
    def bytes_after(self) -> int | None:
        """Bytes each rank sends now."""
        return _total(self.after)


@dataclass(frozen=True)
class Step(StrictJson):
    """One communicating operation of a rewritten graph; a fused operation is one step.

    op: a functional collective's name, or that of a fused operator. group: the global ranks it runs over.
    dtype, hidden: of its input. module: qualified name of the module it stands in, to name it in messages.
    sends: which of the original collectives' inputs it sends: "#2" is the input of the third one, as it was written;
        with a digest in front, those behind it are added up or changed before they are sent.
    kernel: whether it may run as one kernel in symmetric memory, which a peer's plain collective cannot take part in.
    relies: which inputs of the compiled graph are taken for equal on all ranks: something made of them was moved
        in front of the sum; -1 is one that cannot be told. The ranks compare their values before the first run.
    shapes: a digest of the sizes that what is sent was viewed in on the way, compared with them.
    told: where it may run as one kernel, the options that decide which: "batch_invariant", "overlap".
    """

    op: str
    group: tuple[int, ...]
    dtype: str = ""
    hidden: int | None = None
    module: str = ""
    sends: str = ""
    kernel: bool = False
    relies: tuple[int, ...] = ()
    shapes: str = ""
    told: str = ""


@dataclass(frozen=True)
class Report(StrictJson):
    """All verdicts on one graph, in graph order.

    norms: how many norms the graph has. notes: sentences about the whole graph (a graph break, an internal error).
    collectives_after: how many collectives the rewritten graph still performs (a fused operation performs one).
    steps: what it communicates, in order: with the verdicts, the plan that the ranks of a group must share.
    """

    boundaries: list[Boundary] = field(default_factory=list)
    norms: int = 0
    collectives_after: int = 0
    notes: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def fused(self) -> list[Boundary]:
        return [boundary for boundary in self.boundaries if boundary.fused]

    @property
    def unfused(self) -> list[Boundary]:
        return [boundary for boundary in self.boundaries if not boundary.fused]

    @property
    def fused_forward(self) -> int:
        """How many of the original forward collectives were fused away: what `expect_fused` counts."""
        return sum(boundary.direction == "forward" for boundary in self.fused)

    @property
    def missed(self) -> list[Boundary]:
        """Forward all-reduces that feed a norm and stayed though no policy demands it: what `strict` forbids."""
        waiting = [b for b in self.unfused if b.collective == "all_reduce" and b.direction == "forward"]
        return [boundary for boundary in waiting if boundary.feeds_norm and not boundary.demanded]

    def __str__(self) -> str:
        return self.table()

    def table(self, times: Mapping[int, int] | None = None, names: Mapping[int, str] | None = None) -> str:
        """The report as text. times, names: of boundaries, by their numbers, that stand for those of several layers."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.summary(), title_justify="left", title_style="bold", expand=False)
        columns = ("#", "kind", "module", "norm", "collectives", "bytes a rank sends", "rows", "rewrite", "runs")
        for column in (*columns, "reason"):
            table.add_column(column, overflow="fold")
        for index, boundary in enumerate(self.boundaries):
            table.add_row(
                str(index),
                boundary.kind + (" (backward)" if boundary.direction == "backward" else ""),
                (names or {}).get(index, boundary.module or "-") + _times((times or {}).get(index, 1)),
                boundary.norm or "-",
                _before_and_after(boundary),
                _arrow(size_in_words(boundary.bytes_before), size_in_words(boundary.bytes_after)),
                _arrow(boundary.layout_in or "-", boundary.layout_out or "-"),
                ", ".join(filter(None, (boundary.rewrite, "" if boundary.fused else "not fused"))),
                _runs(boundary),
                boundary.reason,
            )
        out = io.StringIO()
        console = Console(file=out, width=180, color_system=None)
        console.print(table if self.boundaries else self.summary())
        for why in dict.fromkeys(b.runs for b in self.boundaries if b.runs and not b.kernel):
            console.print(why)
        for note in self.notes:
            console.print(f"note: {note}")
        return out.getvalue().rstrip()

    def to_html(self, path: str | Path) -> Path:
        """Write the report as a page for a browser: the picture of the boundaries before and after, and the table."""
        from .page import page

        path = Path(path)
        path.write_text(page(self), encoding="utf-8")
        return path

    def summary(self) -> str:
        count = len(self.boundaries)
        return f"tpfuse: {len(self.fused)} of {count} collective{'s' if count != 1 else ''} fused, {self.norms} norms"


def _before_and_after(boundary: Boundary) -> str:
    if not boundary.before:
        return f"{boundary.collective} {_ranks(boundary.group)}"
    names = [" + ".join(map(str, transfers)) or "none" for transfers in (boundary.before, boundary.after)]
    return _arrow(*names)


def _runs(boundary: Boundary) -> str:
    return "-" if not boundary.runs else "symmetric memory" if boundary.kernel else "functional"


def _times(count: int) -> str:
    return f" ×{count}" if count != 1 else ""


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def size_in_words(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count} B" if count < 10_000 else f"{count / 1e3:.0f} KB" if count < 1e7 else f"{count / 1e6:.0f} MB"


def _total(transfers: tuple[Transfer, ...]) -> int | None:
    known = [transfer.bytes for transfer in transfers if transfer.bytes is not None]
    return sum(known) if len(known) == len(transfers) else None


def _ranks(group: tuple[int, ...]) -> str:
    ranks = list(group)
    if len(ranks) > 4 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}..{ranks[-1]}"
    return ",".join(map(str, ranks)) or "?"


class Reports(list[Report]):
    """The reports of this process. Where there are none, it says why and what to do, when it is printed or indexed."""

    def __getitem__(self, index: Any) -> Any:
        if not self and not isinstance(index, slice):
            raise IndexError(self._why_none())
        return super().__getitem__(index)

    def __repr__(self) -> str:
        return super().__repr__() if self else f"[]  # {self._why_none()}"

    @staticmethod
    def _why_none() -> str:
        from .runtime.nothing_compiled import why_no_reports

        return why_no_reports()


def reports() -> Reports:
    """Every graph this process compiled, in order, also those from a warm compile cache.

    Append-only; survives `torch.compiler.reset()`. The list returned is a copy. An empty one explains itself: printed,
    or asked for an element, it says why nothing was compiled.
    """
    return Reports(state.REPORTS)


def record(report: Report) -> None:
    with state.LOCK:
        state.REPORTS.append(report)
