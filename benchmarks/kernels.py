"""Time the boundary kernels with virtual ranks on one GPU.

    python benchmarks/kernels.py --out results.json                       the lines of the table in docs/kernels.md
    python benchmarks/kernels.py --worlds 2 4 --hidden 4096 --rows 1 64   a slice
    python benchmarks/kernels.py --tune --table table.json                a dispatch table from this machine

One (world, hidden) slice is one process under a time limit, so that a hang costs that slice alone. All slices compile
first, in parallel. Each call is checked against float64 before it is timed. Times are microseconds a call, medians of
alternating CUDA-graph replays, including a fork to and a join of one stream a rank (the "empty" provider).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import machine

from tpfuse.kernels.add_norm import AddNormOut, add_norm_reference
from tpfuse.kernels.barrier import barrier
from tpfuse.kernels.barrier import fits as barrier_fits
from tpfuse.kernels.compat import next_power_of_2
from tpfuse.kernels.dispatch import Table, bind, default_table
from tpfuse.kernels.one_shot import fits as one_shot_fits
from tpfuse.kernels.one_shot import one_shot
from tpfuse.kernels.operands import Operands
from tpfuse.kernels.tune import measured_entries
from tpfuse.kernels.two_shot import fits as two_shot_fits
from tpfuse.kernels.two_shot import two_shot
from tpfuse.kernels.virtual import VirtualRanks, time_graphs
from tpfuse.kernels.workspace import DEFAULT_SLOT_BYTES

# the lines of the table: (hidden, world) -> rows
LINES = {
    (4096, 2): (1, 8, 32, 64, 128), (4096, 4): (1, 8, 32), (4096, 8): (1, 8),
    (8192, 2): (1, 8, 32, 64, 128), (8192, 4): (1, 8, 32), (8192, 8): (1, 8),
}  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """A name and how to bind one call on one rank; None where the workspace does not hold the call."""

    name: str
    bind: Callable[[Operands, Any], Any]


def when(fits: Callable[..., bool], make: Callable[..., Any], *args: Any, **options: Any) -> Callable:
    """Bind `make(op, ws, ...)` where `fits(op, ws)`."""
    return lambda op, ws: make(op, ws, *args, **options) if fits(op, ws) else None


def one(split: int, warps: int, registers: int = 0, spin: bool = True) -> Provider:
    name = f"one_shot s{split} w{warps}" + (f" r{registers}" if registers else "") + ("" if spin else " portable")
    fits = lambda op, ws: one_shot_fits(op, ws, split)  # noqa: E731
    return Provider(name, when(fits, one_shot, split, warps, registers, spin=spin))


def two(warps: int, registers: int = 0) -> Provider:
    name = f"two_shot w{warps}" + (f" r{registers}" if registers else "")
    return Provider(name, when(two_shot_fits, two_shot, warps, registers))


def providers(world: int, hidden: int, tune: bool) -> list[Provider]:
    """What to time: every plausible number of programs a row and warps a program; and, unless it is only to `tune` a
    table, what dispatch picks and the baselines."""
    quads = next_power_of_2(hidden) // 8
    most = min(quads // 32, 32)
    out = [Provider("barrier rotating", when(barrier_fits, barrier))]
    if not tune:
        out += [
            Provider("dispatched", dispatched),
            Provider("unfused", unfused),
            Provider("barrier", when(barrier_fits, barrier, rotate=False)),
        ]
    out += [one(1, most, 0, False), two(most), two(most // 2)]
    for split in (1, 2, 4, 8):
        for warps in (32, 16, 8, 4, 2):
            each = quads / split / (32 * warps)
            if each == 1 or (each == 2 and split == 1):
                out.append(one(split, warps))
    return out


def dispatched(op: Operands, ws: Any) -> Any:
    """What the op layer would run, by the table's entries for virtual ranks."""
    device = "virtual " + torch.cuda.get_device_name()
    entry = default_table().choose(device, ws.world, op.hidden, op.x.element_size(), op.rows)
    return bind(entry, op, ws)


@functools.cache
def inductor_add_norm() -> Callable:
    def add_rms_norm(s: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple:
        h = s + residual
        return torch.nn.functional.rms_norm(h, weight.shape, weight, 1e-6), h

    return torch.compile(add_rms_norm, dynamic=False)


class unfused:
    """A plain all-reduce by our own kernel on the same pointers, then Inductor's add + norm."""

    def __init__(self, op: Operands, ws: Any) -> None:
        plain = dataclasses.replace(op, residual=None, weight=None, norm="none", residual_dtype=None)
        entry = default_table().choose("virtual " + torch.cuda.get_device_name(), ws.world, op.hidden, 2, op.rows)
        self.first = bind(entry, plain, ws) or (two_shot(plain, ws) if two_shot_fits(plain, ws) else barrier(plain, ws))
        self.op, self.constants, self.programs = op, self.first.constants, self.first.programs
        self.load()
        self.second()

    def load(self) -> Any:
        return self.first.load()

    def second(self) -> None:
        y, h = inductor_add_norm()(self.first.out.y, self.op.residual, self.op.weight)
        self.out = AddNormOut(y, h, None, None)

    def run(self) -> None:
        self.first.run()
        self.second()


class Empty:
    """A kernel that does nothing: what the launches and the fork and join cost by themselves."""

    def __init__(self) -> None:
        import triton

        @triton.jit
        def nothing():
            pass

        self.kernel = nothing

    def run(self) -> None:
        self.kernel[(1,)](num_warps=4)


def operands(world: int, hidden: int, rows: int) -> tuple[list[Operands], Any]:
    """Fresh random operands of every rank, and the float64 truth."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(torch.bfloat16)

    xs = [draw(rows, hidden) for _ in range(world)]
    residual, weight = draw(rows, hidden), draw(hidden)
    ops = [
        Operands(x, residual.clone(), None, weight, None, 1e-6, "rms_norm", torch.bfloat16, torch.bfloat16) for x in xs
    ]
    truth = add_norm_reference(
        torch.stack(xs).double().sum(0), residual.double(), None, weight.double(), None, 1e-6, norm="rms_norm",
        out_dtype=torch.float64, residual_dtype=torch.float64,
    )  # fmt: skip
    return ops, truth


def check(launches: list[Any], truth: Any) -> str:
    """Empty when every rank's outputs are right and bitwise equal."""

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a.double() - b).norm() / b.norm()).item()

    first = launches[0].out
    for launch in launches:
        if not torch.equal(launch.out.y, first.y) or not torch.equal(launch.out.residual_out, first.residual_out):
            return "ranks differ"
    worst = max(error(first.y, truth.y), error(first.residual_out, truth.residual_out))
    return "" if worst < 6e-3 else f"error {worst:.1e}"


def run_slice(world: int, hidden: int, rows_list: list[int], tune: bool, load_only: bool) -> list[dict]:
    largest = 2 * (max(rows_list) + world) * hidden * 2
    ranks = VirtualRanks(world, slot_bytes=max(DEFAULT_SLOT_BYTES, largest))
    empty = Empty()
    torch.cuda.synchronize()
    empty.run()
    torch.cuda.synchronize()
    records = []
    for rows in rows_list:
        size = {"world": world, "hidden": hidden, "rows": rows}
        ops, truth = operands(world, hidden, rows)
        bound: dict[str, list] = {}
        notes: dict[str, str] = {}
        torch.compiler.reset()
        for provider in providers(world, hidden, tune):
            try:
                launches = ranks.bind(lambda ws, p=provider, o=ops: p.bind(o[ws.rank], ws))
            except ValueError:  # does not fit
                continue
            bound[provider.name] = launches
        if load_only:
            continue
        graphs = {"empty": ranks.capture([empty] * world)}
        shape = {}
        for name, launches in bound.items():
            for launch in launches:
                launch.out.y.fill_(float("nan"))  # an output nobody writes must not pass for right
                launch.out.residual_out.fill_(float("nan"))
            torch.cuda.synchronize()
            ranks.run(launches)
            torch.cuda.synchronize()
            wrong = check(launches, truth)
            if wrong:
                notes[name] = wrong
                continue
            graphs[name] = ranks.capture(launches)
            graphs[name].replay()
            torch.cuda.synchronize()
            wrong = check(launches, truth)
            if wrong:
                notes[name] = "after replay: " + wrong
            compiled = launches[0].load()
            shape[name] = {"programs": launches[0].programs, "registers": compiled.n_regs, "spills": compiled.n_spills}
        for name, (median, spread) in time_graphs(graphs).items():
            timed = {"provider": name, "us": round(median, 3), "spread": round(spread, 3), "note": notes.pop(name, "")}
            records.append({**size, **timed, **shape.get(name, {})})
        records += [{**size, "provider": name, "us": None, "note": note} for name, note in notes.items()]
    return records


def orchestrate(slices: dict[tuple[int, int], tuple[int, ...]], arguments: argparse.Namespace) -> list[dict]:
    def command(hidden: int, world: int, rows: tuple[int, ...], *more: str) -> list[str]:
        tune = ["--tune"] if arguments.tune else []
        return [sys.executable, __file__, "--slice", f"{hidden}", f"{world}", *map(str, rows), *tune, *more]

    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    loading = [
        subprocess.Popen(command(hidden, world, rows, "--load-only"), env=env, stdout=subprocess.DEVNULL)
        for (hidden, world), rows in slices.items()
    ]
    for process in loading:
        try:
            process.wait(timeout=arguments.limit)
        except subprocess.TimeoutExpired:
            process.kill()
    records: list[dict] = []
    for (hidden, world), rows in slices.items():
        if arguments.one_process:
            records += run_slice(world, hidden, list(rows), arguments.tune, load_only=False)
        else:
            records += run_apart(command(hidden, world, rows), env, arguments.limit)
        print(f"hidden {hidden} world {world}: {len(records)} records", flush=True)
        save(records, arguments)
    return records


def run_apart(command: list[str], env: dict[str, str], limit: float) -> list[dict]:
    """One slice in a process of its own; nothing when it hangs or fails."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        print("HUNG:", *command[2:], flush=True)
        return []
    lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    if done.returncode or not lines:
        print("failed:", *command[2:], done.stderr[-3000:], flush=True)
        return []
    return json.loads(lines[-1])


def save(records: list[dict], arguments: argparse.Namespace) -> None:
    """After each slice, so that a run that is cut short leaves what it measured."""
    if arguments.table:
        entries = measured_entries(records, "virtual " + torch.cuda.get_device_name())
        arguments.table.write_text(Table(entries, "measured on virtual ranks").to_json(indent=1))
    if arguments.out:
        described = machine("virtual ranks on one GPU")
        arguments.out.write_text(json.dumps({"machine": described, "records": records}, indent=1))


def table(records: list[dict]) -> None:
    """One line a size: the empty launches, our barrier, and the others from the fastest."""
    sizes = sorted({(r["hidden"], r["world"], r["rows"]) for r in records})
    for size in sizes:
        here = {r["provider"]: r for r in records if (r["hidden"], r["world"], r["rows"]) == size}
        timed = sorted((r for r in here.values() if r["us"] is not None and r["provider"] != "empty"),
                       key=lambda r: r["us"])  # fmt: skip
        cells = "  ".join(f"{r['provider']} {r['us']:.1f}" for r in timed)
        bad = "  ".join(f"{r['provider']}: {r['note']}" for r in here.values() if r["note"])
        print(*size, f"empty {here['empty']['us']:.1f} |", cells, f"!! {bad}" if bad else "")


def plot(results: Path, picture: Path) -> None:
    """Microseconds over rows, one panel a (hidden, world): the fastest variant of each kernel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in json.loads(results.read_text())["records"] if r["us"] is not None]
    hiddens, worlds = sorted({r["hidden"] for r in records}), sorted({r["world"] for r in records})
    figure, panels = plt.subplots(len(worlds), len(hiddens), figsize=(3.2 * len(hiddens), 2.6 * len(worlds)),
                                  sharex=True, squeeze=False, layout="constrained")  # fmt: skip
    for line, world in zip(panels, worlds, strict=True):
        for panel, hidden in zip(line, hiddens, strict=True):
            here = [r for r in records if (r["world"], r["hidden"]) == (world, hidden)]
            for kernel in ("one_shot", "two_shot", "barrier rotating", "unfused", "empty"):
                best: dict[int, float] = {}
                for r in here:
                    if r["provider"].startswith(kernel) and "portable" not in r["provider"]:
                        best[r["rows"]] = min(best.get(r["rows"], r["us"]), r["us"])
                if best:
                    panel.plot(*zip(*sorted(best.items()), strict=True), marker=".", label=kernel.replace("_", "-"))
            panel.set(title=f"{world} ranks, hidden {hidden}")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter("{x:g}")
            panel.grid(True, alpha=0.3)
    panels[0][0].legend(fontsize="small")
    figure.supxlabel("rows")
    figure.supylabel("µs a call, virtual ranks on one GPU")
    figure.savefig(picture, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="*")
    parser.add_argument("--hidden", type=int, nargs="*")
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("--tune", action="store_true", help="leave out dispatch and the baselines")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="write a dispatch table with the fastest kernel at each size")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RESULTS", "PICTURE"), help="draw a results file")
    parser.add_argument("--limit", type=float, default=100, help="seconds for one slice")
    parser.add_argument("--one-process", action="store_true", help="faster, but a hang costs everything after it")
    parser.add_argument("--slice", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--load-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # one hardware queue a stream; read when CUDA starts
    if arguments.plot:
        plot(*arguments.plot)
        return
    if arguments.slice:
        hidden, world, *rows = arguments.slice
        print(json.dumps(run_slice(world, hidden, rows, arguments.tune, arguments.load_only)))
        return
    slices = {}
    for hidden in arguments.hidden or sorted({h for h, _ in LINES}):
        for world in arguments.worlds or (2, 4, 8):
            rows = tuple(arguments.rows or LINES.get((hidden, world), (1, 8, 32)))
            slices[hidden, world] = rows
    records = orchestrate(slices, arguments)
    table(records)


if __name__ == "__main__":
    main()
