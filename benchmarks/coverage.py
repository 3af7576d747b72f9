"""How many of the all-reduces that feed a norm are fused, by model family and mode.

    python benchmarks/coverage.py                            every family, on 2 and on 8 ranks, and the numbers on 2
    python benchmarks/coverage.py --families llama,opt       only these; the others keep the results they have
    python benchmarks/coverage.py --no-numbers               matching only (fake process groups, nothing runs)

Writes benchmarks/results/coverage.json after every cell, so that an interrupted run goes on where it was (`--again`
starts over), and docs/coverage.md from it.

The number of all-reduces that feed a norm is written down beforehand in tests/families.py and confirmed by walks over
the graph that share no code with the recogniser (tests/reachability.py). "Patterns" is what plain
`register_replacement` patterns find on the same graphs (pattern_baseline.py). Numbers: two gloo processes, bfloat16,
the same weights and inputs in float64 uncut as reference; training compares the forward pass, in training mode.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from records import write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from tests.families import BY_NAME, FAMILIES, HIDDEN, MODES, NAMED, Family, call_of, cut_model, whole_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results" / "coverage.json", ROOT / "docs" / "coverage.md"
DTYPE = torch.bfloat16
NUMBERS_WORLD = 2
WORLDS = (2, 8)  # of the tables


@dataclass(frozen=True)
class Cell:
    """One family in one mode on `world` ranks, as rank 0 sees it. Counts are of forward all-reduces, except where said.

    expected: those that feed a norm, by hand; walked: the same, by the walks. patterns: sites the plain patterns find.
    collectives: all of the graph, backward included; unfused: reason -> how many of those that feed a norm.
    """

    family: str
    mode: str
    world: int
    collectives: int = 0
    expected: int = 0
    walked: int = 0
    fused: int = 0
    patterns: int = 0
    unfused: dict[str, int] | None = None
    error: str = ""


@dataclass(frozen=True)
class Numbers:
    """Largest relative L2 error against float64 over the ranks, for eager mode, Inductor and tpfuse on Inductor."""

    family: str
    mode: str
    eager: float = 0.0
    inductor: float = 0.0
    tpfuse: float = 0.0
    error: str = ""


# -- matching ---------------------------------------------------------------------------------------------------------


def matched(family: Family, mode: str, world: int) -> Cell:
    from pattern_baseline import sites_found

    from tests.family_graphs import trace_family
    from tests.graphs import fake_world
    from tests.reachability import feeding_all_reduces

    facts: dict[str, Any] = dict(family=family.name, mode=mode, world=world, expected=family.feeding)
    try:
        traced = trace_family(family.name, mode, world, whole_model(family, DTYPE))
    except Exception as error:
        return Cell(**facts, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    report = traced.report
    unfused: dict[str, int] = {}
    for boundary in report.missed:
        unfused[boundary.reason] = unfused.get(boundary.reason, 0) + 1
    with fake_world(world):
        group = dist.group.WORLD.group_name
        patterns = sum(sites_found(graph, group) for graph in traced.graphs)
    return Cell(
        **facts,
        collectives=len(report.boundaries),
        walked=sum(len(feeding_all_reduces(graph.graph, HIDDEN)) for graph in traced.graphs),
        fused=report.fused_forward,
        patterns=patterns,
        unfused=unfused,
    )


# -- numbers ----------------------------------------------------------------------------------------------------------


def numbers_of_rank(rank: int, name: str, mode: str) -> dict[str, float]:
    """Relative errors against the uncut model in float64; every way of running gets a model of its own, and no
    graph comes from a cache."""
    family = BY_NAME[name]
    whole = whole_model(family, DTYPE).double()
    whole.config._experts_implementation = "eager"  # grouped products know no float64
    exact = _outputs(whole, mode, None)
    errors = {}
    for how in ("eager", "inductor", "tpfuse"):
        torch.compiler.reset()
        cut = cut_model(family, whole_model(family, DTYPE), rank, NUMBERS_WORLD)
        got = _outputs(cut, mode, None if how == "eager" else how)
        errors[how] = float((got - exact).norm() / exact.norm())
    return errors


def _outputs(model: torch.nn.Module, mode: str, backend: str | None) -> torch.Tensor:
    function, arguments, gradients = call_of(model, mode)
    if backend is not None:
        function = torch.compile(function, backend=backend, fullgraph=True, dynamic=mode == "dynamic" or None)
    with torch.set_grad_enabled(gradients):
        out = function(**arguments)
    return out.detach().double()


def numbers(family: Family, mode: str) -> Numbers:
    from tests.ranks import run_processes

    if mode in family.exceptions:
        return Numbers(family.name, mode, error="random masks: no two runs are alike")
    try:
        ranks = run_processes(NUMBERS_WORLD, numbers_of_rank, family.name, mode, timeout=500)
    except Exception as error:
        return Numbers(family.name, mode, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    return Numbers(family.name, mode, **{how: max(rank[how] for rank in ranks) for how in ranks[0]})


# -- results ----------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    cells: dict[str, Cell]
    numbers: dict[str, Numbers]

    @staticmethod
    def load() -> Results:
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": [], "numbers": []}
        return Results(
            {f"{c['family']} {c['mode']} {c['world']}": Cell(**c) for c in found["cells"]},
            {f"{n['family']} {n['mode']}": Numbers(**n) for n in found["numbers"]},
        )

    def save(self) -> None:
        machine = dict(
            processor=platform.processor() or platform.machine(), torch=torch.__version__, dtype=str(DTYPE),
            python=platform.python_version(), date=time.strftime("%Y-%m-%d"),
        )  # fmt: skip
        found = {
            "machine": machine,
            "cells": [asdict(cell) for cell in self.cells.values()],
            "numbers": [asdict(entry) for entry in self.numbers.values()],
        }
        write(RESULTS, found)


# -- the page ---------------------------------------------------------------------------------------------------------

_HEAD = """# Coverage

What `torch.compile(model, backend="tpfuse")` fuses in real model families, cut by Hugging Face's own plan or by
`parallelize_module`, in tiny random configurations (2 layers). Written by `python benchmarks/coverage.py` from
`benchmarks/results/coverage.json`; a cell that was not run is missing from the tables.

- *feed a norm*: all-reduces of the forward pass whose sum a norm reads with nothing but row-wise arithmetic in between.
  Worked out by hand beforehand (tests/families.py says how) and confirmed by walks over the graph that share no code
  with the recogniser (tests/reachability.py); where the two differ the table shows both.
- *fused*: how many of those tpfuse fuses. *patterns*: how many plain `register_replacement` patterns find on the same
  graph: three spellings of the norm, both orders of the addition, two values of eps, bfloat16 and float32, 2-D and 3-D.
- *collectives*: all of the graph's, backward included.
"""


def page(results: Results) -> str:
    lines = [_HEAD]
    by_world = {world: _cells_of(results, world) for world in WORLDS}
    for worlds, cells in _alike(by_world):
        ran = [c for c in cells if not c.error]
        total = [sum(getattr(c, what) for c in ran) for what in ("expected", "fused", "patterns")]
        lines += [
            f"## {' and '.join(map(str, worlds))} ranks",
            "",
            f"{total[1]} of {total[0]} all-reduces that feed a norm are fused; plain patterns find {total[2]}."
            + (" Both numbers of ranks give the same counts." if len(worlds) > 1 else ""),
            "",
            "| family | mode | collectives | feed a norm | fused | patterns |",
            "|---|---|---:|---:|---:|---:|",
            *(_row(cell) for cell in cells),
            "",
        ]
    entries = [n for f in FAMILIES for m in MODES if (n := results.numbers.get(f"{f.name} {m}")) is not None]
    if entries:
        lines += [
            "## Numbers",
            "",
            f"Largest relative L2 error of the logits against float64, over {NUMBERS_WORLD} gloo processes, bfloat16.",
            "",
            "| family | mode | eager | Inductor | tpfuse |",
            "|---|---|---:|---:|---:|",
            *(
                f"| {n.family} | {n.mode} | {n.eager:.2e} | {n.inductor:.2e} | {n.tpfuse:.2e} |"
                if not n.error
                else f"| {n.family} | {n.mode} | | | {n.error} |"
                for n in entries
            ),
            "",
        ]
    lines += ["## Exceptions", ""]
    for family in FAMILIES:
        for mode, (fused, why) in family.exceptions.items():
            lines += [f"**{family.name}, {mode}: {fused} of {family.feeding} fused.** {why}", ""]
            cell = results.cells.get(f"{family.name} {mode} 2")
            for reason, count in (cell.unfused or {}).items() if cell else ():
                times = "once" if count == 1 else f"{count} times"
                lines += [f"The report says {times}: {reason}.", ""]
        for mode, why in family.cannot.items():
            fails = f"**{family.name}, {mode}: the model itself fails once it is cut**, in eager mode too: {why}."
            lines += [fails, ""]
    return "\n".join(lines).rstrip() + "\n"


def _cells_of(results: Results, world: int) -> list[Cell]:
    return [c for f in FAMILIES for m in MODES if (c := results.cells.get(f"{f.name} {m} {world}")) is not None]


def _alike(by_world: dict[int, list[Cell]]) -> list[tuple[list[int], list[Cell]]]:
    """Numbers of ranks whose rows are the same, and these rows once."""
    found: list[tuple[list[int], list[Cell]]] = []
    for world, cells in by_world.items():
        same = next((each for each in found if [*map(_row, each[1])] == [*map(_row, cells)]), None)
        if same is not None:
            same[0].append(world)
        elif cells:
            found.append(([world], cells))
    return found


def _row(cell: Cell) -> str:
    if cell.error:
        return f"| {cell.family} | {cell.mode} | | {cell.expected} | {cell.error} | |"
    feeding = str(cell.expected) if cell.walked == cell.expected else f"{cell.expected} (walks: {cell.walked})"
    return f"| {cell.family} | {cell.mode} | {cell.collectives} | {feeding} | {cell.fused} | {cell.patterns} |"


def show(results: Results) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(page(results)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(family.name for family in FAMILIES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--worlds", default="2,8")
    parser.add_argument("--no-numbers", action="store_true", help="matching only")
    parser.add_argument("--again", action="store_true", help="run cells that have results already")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    results = Results.load()
    named = {family.name for family in NAMED}
    for name in chosen.families.split(","):
        for mode in (mode for mode in chosen.modes.split(",") if mode in BY_NAME[name].modes):
            for world in map(int, chosen.worlds.split(",")):
                key = f"{name} {mode} {world}"
                if chosen.again or key not in results.cells or results.cells[key].error:
                    results.cells[key] = cell = matched(BY_NAME[name], mode, world)
                    results.save()
                    print(key, f"fused {cell.fused} of {cell.expected}", cell.error, flush=True)
            key = f"{name} {mode}"
            if (
                not chosen.no_numbers
                and name in named
                and (chosen.again or key not in results.numbers or results.numbers[key].error)
            ):
                results.numbers[key] = entry = numbers(BY_NAME[name], mode)
                results.save()
                print(key, entry, flush=True)
    DOCS.write_text(page(results))
    show(results)


if __name__ == "__main__":
    main()
