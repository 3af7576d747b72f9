"""`python -m tpfuse tune`: measure this machine's kernels and write the dispatch table that follows.

    plan (which sizes, which kernels) -> measure, size by size -> the fastest kernel of each -> a table

On one GPU the ranks are virtual and the table is for virtual ranks: it says which kernel is cheap, nothing of links.
Under `torchrun --nproc-per-node N` every process is one rank, the links are real, and the table holds for N ranks.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..kernels.bench.table import candidates, compacted, measured_entries, name_of
from ..kernels.symmetric.dispatch import Entry, Table
from ..kernels.symmetric.registry import worlds

WORLDS = (2, 4, 8)  # measured where none are named
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
MORE_ROWS = (1024, 2048, 4096)  # over links; virtual ranks would only measure their one device's memory
HIDDEN = (2048, 4096, 7168, 8192)
# What one measurement and the compilation of one kernel took on an H200's host; only for saying how long it may take.
SECONDS_EACH, SECONDS_TO_COMPILE = 0.15, 1.2
NOISE = 0.01  # two runs of one kernel differ by about as much


@dataclass(frozen=True)
class Plan:
    """What will be measured: every candidate of every size. `linked`: over real links, one process a GPU."""

    worlds: tuple[int, ...]
    hidden: tuple[int, ...]
    rows: tuple[int, ...]
    linked: bool

    def __post_init__(self) -> None:
        for name, allowed in (("worlds", worlds()), ("hidden", range(8, 16385, 8)), ("rows", range(1, (1 << 20) + 1))):
            given = getattr(self, name)
            if not given:
                raise OptionError(f"tune: no {name} given; allowed: {_shown(allowed)}")
            for value in given:
                if value not in allowed:
                    raise OptionError(f"tune: {name} has {value}; allowed: {_shown(allowed)}")

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        return [(world, hidden, rows) for world in self.worlds for hidden in self.hidden for rows in self.rows]

    def entries(self, device: str, size: tuple[int, int, int]) -> list[Entry]:
        return candidates(device, *size, self.linked)

    @property
    def measurements(self) -> int:
        return sum(len(self.entries("", size)) for size in self.sizes)

    @property
    def seconds(self) -> float:
        """About how long it takes. A kernel is compiled once for each hidden size, twice where many rows share one."""
        compiled = sum(2 * len(self.entries("", (w, h, 1))) for w in self.worlds for h in self.hidden)
        return self.measurements * SECONDS_EACH + compiled * SECONDS_TO_COMPILE


def _shown(allowed: Any) -> str:
    if isinstance(allowed, range):
        step = f" in steps of {allowed.step}" if allowed.step != 1 else ""
        return f"{allowed.start} to {allowed.stop - 1}{step}"
    return ", ".join(map(str, allowed))


def explain(plan: Plan, output: Path) -> str:
    """What a run would do, in words; needs no GPU."""
    if plan.linked:
        where = f"{plan.worlds[0]} processes, one a GPU, over real links"
    else:
        where = "virtual ranks: one process and one GPU play all ranks, so links are not measured"
    lines = [
        f"Would measure on {where}.",
        "",
        f"  ranks   {', '.join(map(str, plan.worlds))}",
        f"  hidden  {', '.join(map(str, plan.hidden))}   (bfloat16)",
        f"  rows    {', '.join(map(str, plan.rows))}",
        f"  sizes   {len(plan.sizes)}: every combination",
        "",
        "Kernels at each size (one_shot sS wW: S programs a row, W warps each):",
    ]
    for hidden in plan.hidden:
        names = [name_of(entry) for entry in plan.entries("", (plan.worlds[0], hidden, 1))]
        lines.append(f"  hidden {hidden}: {', '.join(names)}")
    lines += [
        "",
        f"{plan.measurements} measurements at most (a kernel that does not fit a size is left out). Each is one",
        "all-reduce + residual + RMSNorm of random values, checked against float64 and for equal bits on all ranks,",
        "then captured 12 times into a CUDA graph, three such graphs (nine of small calls); 5 rounds of 5 replays of",
        "each, kernels taking turns; each graph's median, of the slowest rank, and the median of those counts.",
        f"Estimated time: {plan.seconds / 60:.0f} to {plan.seconds * 2 / 60:.0f} minutes, most of it for compiling.",
        f"The table would go to {output}. Use it with TPFUSE_DISPATCH_TABLE={output} on every rank.",
    ]
    return "\n".join(lines)


def ranks_here() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def tune(plan: Plan, output: Path, say: Callable[[str], None]) -> Table:
    """Measure, write the table after every size, return it. Under torchrun collective; rank 0 writes and speaks."""
    import torch
    import torch.distributed as dist
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # one hardware queue for each virtual rank's stream
    if not torch.cuda.is_available():
        raise OptionError("tune: this machine has no CUDA device to measure; --dry-run says what would be measured")
    if plan.linked:
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local)
        limit = datetime.timedelta(seconds=300)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local), timeout=limit)
    first = not plan.linked or dist.get_rank() == 0
    records: list[dict[str, Any]] = []
    table = Table()
    bar = Progress(TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   disable=not first)  # fmt: skip
    with bar:
        task = bar.add_task("compiling", total=plan.measurements)

        def done(name: str) -> None:
            bar.advance(task)

        for world in plan.worlds:
            ranks = _ranks(plan, world)
            for hidden in plan.hidden:
                for rows in plan.rows:
                    bar.update(task, description=f"{world} ranks, hidden {hidden}, {rows} rows")
                    records += _measure(plan, ranks, (world, hidden, rows), done)
                    entries = measured_entries(records, ranks.device_name, NOISE)
                    table = Table(compacted(entries), f"measured by tpfuse tune on {ranks.setting}")
                    if first:
                        _write(table, output)
    wrong = [f"{r['provider']} with {r['rows']} rows of {r['hidden']}: {r['note']}" for r in records if r["note"]]
    if first:
        for line in wrong:
            say(f"left out: {line}")
        say(f"{len(table.entries)} entries in {output}; use it with TPFUSE_DISPATCH_TABLE={output} on every rank")
    if plan.linked:
        dist.destroy_process_group()
    return table


def _ranks(plan: Plan, world: int) -> Any:
    """Room for every kernel at the largest size: a one-shot's slot holds all ranks' rows, a two-shot's its own."""
    from ..kernels.bench.linked import LinkedRanks
    from ..kernels.bench.virtual import VirtualRanks
    from ..kernels.symmetric.workspace import DEFAULT_SLOT_BYTES

    room = max(DEFAULT_SLOT_BYTES, world * (max(plan.rows) + world) * max(plan.hidden) * 2)
    return LinkedRanks(slot_bytes=room) if plan.linked else VirtualRanks(world, slot_bytes=room)


def _measure(plan: Plan, ranks: Any, size: tuple[int, int, int], done: Callable[[str], None]) -> list[dict[str, Any]]:
    from ..kernels.bench.measure import measure, provider_of

    group_name = getattr(ranks, "group_name", "")
    providers = [provider_of(entry, group_name) for entry in plan.entries(ranks.device_name, size)]
    return [asdict(record) for record in measure(ranks, size[1], size[2], providers, done)]


def _write(table: Table, output: Path) -> None:
    """Whole or not at all."""
    aside = output.with_name(output.name + ".part")
    aside.write_text(table.to_json(indent=1) + "\n", encoding="utf-8")
    aside.replace(output)
