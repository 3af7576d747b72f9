"""Markdown tables from the results files, as docs/performance.md has them.

    python benchmarks/tables.py [--card h100] linked | shipped | four | side_by_side | brings | four_summary |
        virtual | virtual_summary | quantised | norm | norm_summary | variants | layers | models | models_short |
        reduce_overhead | overhead | policy_families

Where a card was measured in several runs, times are means over them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import loss_curves
import model_tables
import overlap_tables
import policy_families
import training_tables
from md import RESULTS, records_of, table
from records import documents

from tpfuse.kernels.add_norm import tuning
from tpfuse.kernels.bench.table import name_of
from tpfuse.kernels.compat import next_power_of_2
from tpfuse.kernels.symmetric.tables import H100, SHIPPED


@dataclass(frozen=True)
class Run:
    """One run of kernels.py: the results file, and which of its runs. `most_rows`: the kernels of calls with more rows
    have changed since."""

    file: str
    index: int = 0
    most_rows: float = math.inf

    @property
    def name(self) -> str:
        return f"{self.file}, run {self.index + 1}"

    def document(self) -> dict:
        document = documents(RESULTS / self.file)[self.index]
        return document | {"records": [r for r in document["records"] if r["rows"] <= self.most_rows]}


@dataclass(frozen=True)
class Card:
    """The files with the runs of one kind of GPU: over links, and of virtual ranks. `before`: the last run over links
    before kernels worked a row ahead."""

    device: str
    linked: tuple[Run, ...]
    virtual: tuple[Run, ...]
    norm: str
    layers: str
    models: str
    variants: str
    peers: tuple[Run, ...] = ()
    before: tuple[Run, ...] = ()
    four: tuple[Run, ...] = ()


ALONE = 128  # rows, on two linked GPUs of 132 multiprocessors: each has a program of its own
CARDS = {
    "h200": Card("NVIDIA H200", tuple(Run("kernels_linked_h200.json", i, ALONE) for i in range(5)),
                 (Run("kernels_h200.json"),), "norm_h200.json", "layers_h200.json", "end_to_end_h200_x2.json",
                 "norm_variants_h200.json", (Run("peers_h200.json"),), four=(Run("kernels_linked_h200_x4.json"),)),
    "h100": Card(H100, (*(Run("kernels_linked_h100.json", i, ALONE) for i in range(7)),
                        *(Run("kernels_linked_h100.json", i) for i in range(7, 11))),
                 (Run("kernels_h100.json", 0), Run("kernels_h100.json", 1)), "norm_h100.json", "layers_h100.json",
                 "end_to_end_h100_x2.json", "norm_variants_fine_h100.json",
                 before=(Run("kernels_linked_h100.json", 6),)),
}  # fmt: skip
REDUCE_OVERHEAD = "reduce_overhead_h200_x2.json"
SEPARATE = ("nccl", "symm_mem one-shot", "symm_mem two-shot", "unfused", "functional")


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


Times = dict[str, float]  # provider -> us


def _times(runs: Iterable[Run]) -> dict[tuple[int, int, int], Times]:
    """(hidden, N, rows) -> means over the runs, in order of size."""
    every: dict[tuple[int, int, int], dict[str, list[float]]] = {}
    for r in (record for run in runs for record in run.document()["records"]):
        if r["us"] is not None:
            every.setdefault((r["hidden"], r["world"], r["rows"]), {}).setdefault(r["provider"], []).append(r["us"])
    return {size: {p: statistics.mean(us) for p, us in every[size].items()} for size in sorted(every)}


def _picked(device: str, size: tuple[int, int, int]) -> str:
    """The provider that the shipped table picks."""
    hidden, world, rows = size
    return name_of(SHIPPED.choose(device, world, hidden, 2, rows))


def linked(card: Card) -> str:
    """One boundary over real links, two GPUs."""
    return _linked(card, card.linked)


def four(card: Card) -> str:
    """The same, four GPUs."""
    return _linked(card, card.four)


def side_by_side(card: Card) -> str:
    """One boundary over 2 linked H100s and over 4 GPUs of `card`: the picked kernel beside the best of the others."""
    pairs = (CARDS["h100"].linked, H100), (card.four, card.device)
    sizes: dict[tuple[int, int], list[list[str]]] = {}
    for place, (runs, device) in enumerate(pairs):
        for (hidden, world, rows), us in _times(runs).items():
            if hidden not in (4096, 8192):
                continue
            mine = us[_picked(device, (hidden, world, rows))]
            other = min(us[p] for p in SEPARATE if p in us and p != "functional")
            cells = sizes.setdefault((hidden, rows), [["–"] * 4, ["–"] * 4])
            cells[place] = [f"{us['floor']:.1f}", f"**{mine:.1f}**", _us(other), _us(us.get("nccl"))]
    both = {size: cells for size, cells in sizes.items() if size[1] in (1, 8, 32, 128, 512, 2048, 8192)}
    rows = [[f"{hidden}", f"{rows}", *left, *right] for (hidden, rows), (left, right) in sorted(both.items())]
    names = ("floor", "tpfuse", "best other", "NCCL + Inductor")
    return table(["hidden", "rows", *(f"2 × H100: {names[0]}", *names[1:]),
                  *(f"4 × {card.device.split()[-1]}: {names[0]}", *names[1:])], rows)  # fmt: skip


def brings(card: Card) -> str:
    """At most eight rows for the README: boundaries on 2 and 4 GPUs, and steps of a model with CUDA graphs."""
    lines = []
    for runs, device, name in ((CARDS["h100"].linked, H100, "2 H100s"), (card.four, card.device, "4 H200s")):
        times = _times(runs)
        for rows in (8, 2048):
            size = next(size for size in times if size[0] == 4096 and size[2] == rows)
            mine, other = times[size][_picked(device, size)], times[size]["nccl"]
            cells = [f"{other:.1f} µs", f"**{mine:.1f} µs**", f"{other / mine:.2f}"]
            lines.append([f"a boundary, {rows} rows of 4096, {name} (NCCL + Inductor)", *cells])
    for step, theirs, ours, ratio in model_tables.steps_with_cuda_graphs(REDUCE_OVERHEAD):
        if step in ("decode 1", "decode 64", "prefill 1024", "prefill 8192"):
            cells = [f"{theirs:.2f} ms", f"**{ours:.2f} ms**", f"{ratio:.2f}"]
            lines.append([f"Llama, {step}, 2 H200s, `reduce-overhead`", *cells])
    return table(["", "Inductor", "tpfuse", "ratio"], lines)


def four_summary(card: Card) -> str:
    """Over four GPUs: the shipped table's choices against the best of our kernels, of the others, and the floor."""
    best, other, floor, few, many = [], [], [], [], []
    for size, us in _times(card.four).items():
        mine = us[_picked(card.device, size)]
        best.append((mine / min(_ours(us).values()), size))
        other.append((min(us[p] for p in SEPARATE if p in us) / mine, size))
        (few if size[2] <= 64 else many).append((us["nccl"] / mine, size))
        if size[2] >= 512:
            floor.append((mine / us["floor"], size))
    return "\n".join([
        f"shipped against the best kernel: within 3 % at {_within(best)}, within 6 % at {_within(best, 1.06)}, most "
        f"{sorted(best)[-2:]}",
        f"the best of the others / shipped: {sorted(other)[:2]} to {sorted(other)[-1:]}",
        f"shipped / floor from 512 rows on: {sorted(floor)[:1]} to {sorted(floor)[-2:]}",
        f"NCCL + Inductor / shipped, up to 64 rows: {min(few)} to {max(few)}; more rows: {min(many)} to {max(many)}",
    ])  # fmt: skip


def _linked(card: Card, runs: Iterable[Run]) -> str:
    lines = []
    for (hidden, world, rows), us in _times(runs).items():
        picked = _picked(card.device, (hidden, world, rows))
        if hidden in (4096, 8192) and rows != 4:
            torch_best = min((us[p] for p in SEPARATE[1:3] if p in us), default=None)
            ratio = f"{us['nccl'] / us[picked]:.2f}" if "nccl" in us else "–"
            lines.append([f"{hidden}", f"{rows}", f"{us['floor']:.1f}", f"**{us[picked]:.1f}**", picked,
                          _us(us.get("unfused")), _us(torch_best), _us(us.get("nccl")), ratio])  # fmt: skip
    head = ["hidden", "rows", "floor", "picked", "which", "our all-reduce + Inductor",
            "symm_mem + Inductor", "NCCL + Inductor", "NCCL / picked"]  # fmt: skip
    return table(head, lines)


def shipped(card: Card) -> str:
    """How far the shipped table's choices are from the best, over all measured sizes on 2 linked GPUs."""
    from_best, to_separate, to_torch, few, many = [], [], [], [], []
    for size, us in _times(card.linked).items():
        picked = _picked(card.device, size)
        from_best.append((us[picked] / min(_ours(us).values()), size))
        others = {p: us[p] for p in SEPARATE if p in us}
        best = min(others, key=lambda p: others[p])
        to_separate.append((us[picked] / others[best], size, best))
        to_torch.append((us[picked] / min(t for p, t in others.items() if p != "unfused"), size))
        if "nccl" in us:
            (few if size[2] <= 64 else many).append((us["nccl"] / us[picked], size))
    return "\n".join([
        f"slowest against the best kernel: {max(from_best)}", f"slowest against the best separate: {max(to_separate)}",
        f"slowest against the best of PyTorch and NCCL: {max(to_torch)}",
        f"least against NCCL + Inductor, up to 64 rows: {min(few)}; most: {max(few)}; sizes: {len(few)}",
        f"least against NCCL + Inductor, more rows: {min(many)}; most: {max(many)}; sizes: {len(many)}",
        *_dispatched(card.linked), *_contested(card.linked), *_gains(card),
    ])  # fmt: skip


def _gains(card: Card) -> list[str]:
    """Against unfused, in each run; against kernels that did not work a row ahead, and the floor, with many rows."""
    unfused = [us["unfused"] / us["dispatched"] for run in card.linked for us in _times([run]).values()
               if "dispatched" in us]  # fmt: skip
    lines = [f"unfused / dispatched, every size of every run: {min(unfused):.3f} to {max(unfused):.3f}"]
    before = _times(card.before)
    now = {size: us for size, us in _times(card.linked).items() if size[2] > ALONE and size in before}
    if now:
        gains = sorted((before[size]["dispatched"] / us["dispatched"], size) for size, us in now.items())
        nearest = min((us["dispatched"] / us["floor"], size) for size, us in now.items())
        lines.append(f"dispatched, before / now: {gains[:5]} to {gains[-1:]}")
        lines.append(f"dispatched / floor, least: {nearest}")
    return lines


def _dispatched(runs: Iterable[Run]) -> list[str]:
    """Of each run: how far the operator, by the table of the time, was from the best kernel."""
    lines = []
    for run in runs:
        ratios = [(us["dispatched"] / min(_ours(us).values()), size)
                  for size, us in _times([run]).items() if "dispatched" in us]  # fmt: skip
        if ratios:
            lines.append(f"dispatched against the best kernel, {run.name}: within 3 % at {_within(ratios)}, most "
                         f"{sorted(ratios)[-3:]}")  # fmt: skip
    return lines


def _contested(runs: Iterable[Run]) -> list[str]:
    """Of each size that the operator missed by over 3 % in a run: its two best kernels, and their range over all."""
    each = [_times([run]) for run in runs]
    missed = {size for times in each for size, us in times.items()
              if "dispatched" in us and us["dispatched"] > 1.03 * min(_ours(us).values())}  # fmt: skip
    lines = []
    for size in sorted(missed):
        measured = [_ours(times[size]) for times in each if size in times]
        means = {name: statistics.mean(us[name] for us in measured) for name in measured[0]}
        ranges = (f"{name} {min(us[name] for us in measured):.2f} to {max(us[name] for us in measured):.2f} us"
                  for name in sorted(means, key=lambda name: means[name])[:2])  # fmt: skip
        lines.append(f"missed in a run, {size}: {', '.join(ranges)}, {len(measured)} runs")
    return lines


def _ours(us: dict[str, float]) -> dict[str, float]:
    kernels = ("one_shot s", "two_shot", "barrier rotating", "functional")
    return {p: t for p, t in us.items() if p.startswith(kernels)}


def _within(ratios: list[tuple], limit: float = 1.03) -> str:
    return f"{sum(ratio[0] <= limit for ratio in ratios)} of {len(ratios)}"


def virtual(card: Card) -> str:
    """One boundary on virtual ranks, beside the best peer of the published figures."""
    lines = []
    for (hidden, world, rows), us in _times(card.virtual + card.peers).items():
        best = [_us(min(us[p] for p in us if p.startswith(k))) for k in ("one_shot s", "two_shot")]
        ratio = f"{us['dispatched'] / us['best peer']:.2f}" if "best peer" in us else "–"
        lines.append([f"{hidden}", f"{world}", f"{rows}", *(_us(us[p]) for p in ("empty", "unfused")), *best,
                      f"**{us['dispatched']:.1f}**", _us(us.get("best peer")), ratio])  # fmt: skip
    head = ["hidden", "N", "rows", "empty", "unfused", "best one-shot", "two-shot", "dispatched",
            "best peer", "dispatched / peer"]  # fmt: skip
    return table(head, lines)


def virtual_summary(card: Card) -> str:
    peers, from_best, unfused, portable = [], [], [], []
    for size, us in _times(card.virtual + card.peers).items():
        mine = us["dispatched"]
        from_best.append((us[_picked(f"virtual {card.device}", size)] / min(_ours(us).values()), size))
        unfused.append((us["unfused"] / mine, size))
        portable.append((us["one_shot portable"] / min(us[p] for p in us if p.startswith("one_shot s1")), size))
        if "best peer" in us:
            peers.append((mine / us["best peer"], size))
    ends = f"{sorted(peers)[:1]} to {sorted(peers)[-1:]}"
    mean = f"{statistics.geometric_mean(ratio for ratio, _ in peers):.3f}" if peers else "–"
    return "\n".join([
        f"against the best peer: {ends}, geometric mean {mean}, {len(peers)} sizes",
        f"the shipped table's kernel against the best: {sorted(from_best)[-3:]}",
        *_dispatched(card.virtual),
        f"unfused / dispatched: {min(unfused)} to {max(unfused)}",
        f"portable wait / PTX wait of whole rows: {min(portable)} to {max(portable)}",
    ])  # fmt: skip


def quantised(card: Card) -> str:
    """A boundary whose kernel quantises the rows as well, beside one with Inductor's quantisation behind it."""
    sizes: dict[tuple[str, int, int], Times] = {}
    for r in records_of("quantised_virtual_h200.json"):
        sizes.setdefault((r["quantisation"], r["hidden"], r["rows"]), {})[r["way"]] = r["us"]
    lines = [
        [name.replace("_", " "), f"{hidden}", f"{rows}", *(f"{us[way]:.2f}" for way in us),
         f"{us['fused'] / us['boundary']:.2f}", f"{us['tpfuse + Inductor'] / us['fused']:.2f}"]
        for (name, hidden, rows), us in sizes.items()
    ]  # fmt: skip
    head = ["quantisation", "hidden", "rows", "boundary alone", "fused", "boundary + Inductor", "fused / alone",
            "Inductor / fused"]  # fmt: skip
    return table(head, lines)


def norm(card: Card) -> str:
    records = records_of(card.norm)
    lines = []
    for kind, hidden, size in sorted({(r["norm"], r["hidden"], r["megabytes"]) for r in records}):
        here = {r["provider"]: r for r in records if (r["norm"], r["hidden"], r["megabytes"]) == (kind, hidden, size)}
        cells = [f"{here[p]['us']:.1f} ({here[p]['share']:.0%})" for p in ("ours", "inductor", "liger", "torch")]
        lines.append([kind.split("_")[0], f"{hidden}", f"{size:g}", f"{here['copy']['us']:.1f}", *cells])
    return table(["norm", "hidden", "MB", "copy", "ours", "Inductor", "Liger", "torch, two operations"], lines)


def norm_backward(card: Card) -> str:
    """The local kernel of a norm's backward, beside Inductor's and Liger's."""
    sizes: dict[tuple[str, int, int], dict[str, dict]] = {}
    for r in records_of("norm_backward_h200.json"):
        sizes.setdefault((r["norm"], r["hidden"], r["rows"]), {})[r["provider"]] = r
    lines = []
    for (kind, hidden, rows), here in sizes.items():
        cells = [f"{here[p]['us']:.1f} ({here[p]['share']:.0%})" if p in here else "–" for p in ("inductor", "liger")]
        mine = here["ours"]
        lines.append([kind.split("_")[0], f"{hidden}", f"{rows}", f"{here['copy']['us']:.1f}",
                      f"**{mine['us']:.1f}** ({mine['share']:.0%})", *cells,
                      f"{here['inductor']['us'] / mine['us']:.2f}"])  # fmt: skip
    return table(["norm", "hidden", "rows", "copy", "ours", "Inductor", "Liger", "Inductor / ours"], lines)


def norm_summary(card: Card) -> str:
    """How far the local kernel is ahead of the others, and its share of the copy's bandwidth."""
    records = records_of(card.norm)
    us = {(r["norm"], r["hidden"], r["megabytes"], r["provider"]): r["us"] for r in records}
    lines = []
    for other in ("inductor", "liger"):
        ahead = sorted((1 - t / us[(*size, other)], size) for (*size, p), t in us.items() if p == "ours")
        count = sum(share > 0 for share, _ in ahead)
        lines.append(f"ahead of {other} at {count} of {len(ahead)} sizes, least: {ahead[:14]}")
    for least, most in ((16, 64), (256, 256)):
        share = [r["share"] for r in records if r["provider"] == "ours" and least <= r["megabytes"] <= most]
        if share:
            lines.append(f"share of the copy, {least} to {most} MB: {min(share):.3f} to {max(share):.3f}")
    return "\n".join(lines)


def variants(card: Card) -> str:
    """How far the local kernel's choice is from the best way that was measured, at each size that has several."""
    sizes: dict[tuple[str, int, int], Times] = {}
    for r in records_of(card.variants):
        if r["provider"].startswith("ours ") and r["provider"].split()[-1][1:].isdigit():
            sizes.setdefault((r["norm"], r["hidden"], r["rows"]), {})[r["provider"]] = r["us"]
    excess, left_out = [], 0
    for (kind, hidden, rows), us in sizes.items():
        size = 2 * hidden * rows
        o = tuning(next_power_of_2(hidden), rows, size, kind)
        hints = {"": "", "evict_first": " loads", "evict_first.cs": " loads stores"}[o["EVICT"] + o["STORE"]]
        pieces = " in two" if o["PIECES"] > 1 else ""
        chosen = us.get(f"ours {'late' if o['LATE'] else 'early'}{pieces}{hints} w{o['num_warps']}")
        if chosen is None:
            left_out += 1
        else:
            excess.append((round(chosen / min(us.values()) - 1, 3), kind, hidden, f"{size / (1 << 20):.2f} MB"))
    return f"slower than the best way, of {len(excess)} sizes ({left_out} more without it): {sorted(excess)[::-1][:4]}"


TABLES: dict[str, Callable[[Card], str]] = {f.__name__: f for f in (
    linked, shipped, four, side_by_side, brings, four_summary, virtual, virtual_summary, quantised, norm, norm_summary,
    norm_backward, variants
)} | {
    "layers": lambda card: model_tables.layers(card.layers),
    "models": lambda card: model_tables.models(card.models),
    "models_short": lambda card: model_tables.models_short(card.models),
    "reduce_overhead": lambda _: model_tables.reduce_overhead(REDUCE_OVERHEAD),
    "overhead": lambda _: model_tables.overhead("op_overhead.json"),
    "overhead_slope": lambda _: model_tables.overhead_slope("op_overhead.json"),
    "from_python": lambda _: model_tables.models_from_python("end_to_end_python_h200_x2.json"),
    "models_four": lambda _: model_tables.models_from_python("end_to_end_h200_x4.json"),
    "own_rows": lambda _: model_tables.models_from_python("own_rows_h200_x2.json"),
    "before_after": lambda _: model_tables.before_after("graphs_before_after_h200_x2.json"),
    "quantised_steps": lambda _: model_tables.quantised_steps("end_to_end_fp8_h200_x2.json"),
    "generate": lambda _: model_tables.generate("generate_h200.json"),
    "batching": lambda _: model_tables.batching("continuous_batching_h200_x2.json"),
    "loss_curves": lambda _: loss_curves.markdown(),
    "policy_families": lambda _: policy_families.markdown(),
} | overlap_tables.TABLES | training_tables.TABLES  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h200")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    arguments = parser.parse_args()
    unknown = [name for name in arguments.tables if name not in TABLES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: allowed: {', '.join(TABLES)}")
    for name in arguments.tables or TABLES:
        print(TABLES[name](CARDS[arguments.card]), end="\n\n")
