"""Losses of 200 training steps on two gloo ranks: eager mode, compiled without rewrites and with all of them.

    python benchmarks/loss_curves.py                       writes benchmarks/results/loss_curves.json
    python benchmarks/loss_curves.py --steps 20 --forms plain --inner aot_eager --out FILE

tests/loss_curves.py says what is compared: a run may be `BOUND` times as far from eager mode as eager mode with its
channels in other orders (the controls) has come by the same step. Two faults in the operation of the backward pass are
planted to show that they are found. Exit status 1 where a run is further apart than that, or a fault is not found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are copies of one process, which CUDA does not survive
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from machine import cpu_machine
from md import RESULTS, table
from records import OfModel, write_run

FILE = "loss_curves.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Record(OfModel):
    """phase: the form; size: steps. curve: about twenty of eager mode's losses, the last among them. controls: the
    furthest from eager mode of any of them, and the furthest at the last step. The other runs: furthest, last, the
    largest share of what controls allow, the first step of more than the bound."""

    dtype: str
    curve: list[float]
    controls: list[float]
    unfused: dict[str, Any]
    fused: dict[str, Any]
    faults: dict[str, dict[str, Any]]


def measured(form: str, dtype: str, steps: int, inner: str, controls: int) -> Record:
    from tests.loss_curves import compared
    from tests.ranks import run_processes

    found, _ = run_processes(2, compared, form, DTYPES[dtype], steps, inner, controls, timeout=3000)
    apart = [max(getattr(each, of) for each in found.controls) for of in ("furthest", "last")]
    faults = {name: asdict(fault) for name, fault in found.faults.items()}
    curve = found.eager[:: max(1, steps // 20)] + found.eager[-1:]
    return Record(2, "small", form, steps, dtype, curve, apart, asdict(found.unfused), asdict(found.fused), faults)


def right(record: Record) -> bool:
    runs = record.unfused, record.fused
    return all(r["found_at"] is None for r in runs) and all(f["found_at"] is not None for f in record.faults.values())


def markdown() -> str:
    """The results file as a table."""
    forms = {"plain": "plain", "dtensor": "DTensor's `SequenceParallel`", "megatron": "Megatron's form"}
    lines = []
    for r in json.loads((RESULTS / FILE).read_text())["records"]:
        runs = [r["controls"][0], r["unfused"]["furthest"], r["fused"]["furthest"]]
        faults = [f"{fault['furthest']:.2g}, step {fault['found_at'] + 1}" for fault in r["faults"].values()]
        losses = f"{r['curve'][0]:.2f} → {r['curve'][-1]:.2f}"
        lines.append([forms[r["phase"]], r["dtype"], losses, *(f"{run:.1e}" for run in runs), *faults])
    head = ["form", "dtype", "loss", "eager, other orders", "no rewrites", "every rewrite",
            "half the norm weights' gradients", "residual's gradient lost"]  # fmt: skip
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=["plain", "dtensor", "megatron"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--controls", type=int, default=4)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--out", type=Path, default=RESULTS / FILE)
    arguments = parser.parse_args()
    records = []
    for form in arguments.forms:
        for dtype in arguments.dtypes:
            records.append(measured(form, dtype, arguments.steps, arguments.inner, arguments.controls))
            print(records[-1], flush=True)
            write_run(arguments.out, cpu_machine() | {"inner": arguments.inner}, records)
    raise SystemExit(not all(map(right, records)))


if __name__ == "__main__":
    main()
