"""Inject each fault into two CPU ranks and write down what the user sees, and after how many seconds.

    python benchmarks/faults.py [--output benchmarks/results/faults_cpu.json] [--table docs/reliability.md]

The faults are those of tests/test_stuck.py and tests/test_plan_agreement.py, run through the same harness. Seconds
count from the fault to the first error that a rank reports; `peer_timeout` is that of the tests.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from records import write

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).resolve().parent / "results" / "faults_cpu.json"


@dataclass(frozen=True)
class Fault:
    """fn: what each rank runs, with the folder in which it marks the moment of the fault first, then `args`."""

    name: str
    fn: Callable[..., Any]
    test: str
    args: tuple = ()
    unending: tuple[int, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def all_faults() -> list[Fault]:
    from tests import test_plan_agreement as agreement
    from tests import test_stuck as stuck

    long = 4 * stuck.LIMIT
    detail = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    return [
        Fault("the pass fails on a rank, in the first graph", agreement.broken_on_rank_one,
              "test_one_rank_on_which_the_pass_fails_goes_with_its_peers[first]", ("first",)),
        Fault("the pass fails on a rank, in a later graph", agreement.broken_on_rank_one,
              "test_one_rank_on_which_the_pass_fails_goes_with_its_peers[later]", ("later",)),
        Fault("a rank is killed", stuck.die, "test_a_peer_that_dies[killed]", ("killed",), (1,)),
        Fault("a rank is stopped", stuck.die, "test_a_peer_that_dies[stopped]", ("stopped",), (1,)),
        Fault("a rank skips a call", stuck.skip, "test_a_peer_that_skips_a_call"),
        Fault("a rank brings other rows", stuck.other_rows, "test_a_peer_with_other_rows"),
        Fault("a rank brings other rows, under TORCH_DISTRIBUTED_DEBUG=DETAIL", stuck.other_rows,
              "test_a_peer_with_other_rows_under_the_groups_own_checks", (), (), detail),
        Fault("a rank recompiles, within the limit", stuck.recompile,
              "test_a_peer_that_recompiles_in_time_is_waited_for", (0.3 * stuck.LIMIT,)),
        Fault("a rank recompiles for longer than the limit", stuck.recompile,
              "test_a_peer_that_compiles_for_longer_than_the_limit_is_said_to_compile", (long,)),
        Fault("the group never ends a wait", stuck.never_returns,
              "test_a_wait_that_the_group_does_not_end_ends_the_process", (), (1,)),
    ]  # fmt: skip


def run(fault: Fault) -> dict[str, Any]:
    from tests.faults import outcomes

    with tempfile.TemporaryDirectory() as folder:
        ended = outcomes(2, fault.fn, folder, *fault.args, unending=fault.unending, environment=fault.environment)
        began = float(Path(folder, "fault").read_text())
    still = {rank: "stands still, as injected" for rank in fault.unending if ended[rank].error == "Hang"}
    errors = [still.get(o.rank) or o.error or _without_error(o) for o in ended]
    first = next((o for o in ended if o.error and o.error != "Hang"), None)
    seen = first.message if first is not None else next((o.stderr for o in ended if "PeerTimeoutError" in o.stderr), "")
    raised = [o.seconds - began for o in ended if o.error and o.error != "Hang"] or [ended[0].seconds - began]
    return {
        "fault": fault.name, "rank 0": errors[0], "rank 1": errors[1], "seconds": round(min(raised), 2),
        "message": _shortened(seen), "test": fault.test,
    }  # fmt: skip


def _without_error(outcome: Any) -> str:
    from tpfuse.runtime.heartbeat import EXIT_STUCK

    names = {-9: "killed", -6: "ended by gloo (SIGABRT)", EXIT_STUCK: f"PeerTimeoutError, exit status {EXIT_STUCK}"}
    return names.get(outcome.exitcode, "a right answer" if outcome.value is not None else "no error")


def _shortened(text: str) -> str:
    return re.sub(r"127\.0\.0\.1(\]?):\d+", r"127.0.0.1\1:...", " ".join(text.split()))[:600]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| fault on rank 1 | rank 0 | rank 1 | seconds to the first error | test |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['fault']} | {row['rank 0']} | {row['rank 1']} | {row['seconds']} | `{row['test']}` |" for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    import torch

    from tests.test_stuck import LIMIT

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, help="a page whose table between the marks is replaced")
    arguments = parser.parse_args()
    rows = []
    for fault in all_faults():
        print(f"{fault.name} ...", file=sys.stderr, flush=True)
        rows.append(run(fault))
    machine = {"device": "CPU", "cores": os.cpu_count(), "load": [round(value, 1) for value in os.getloadavg()],
               "system": f"{platform.system()} {platform.machine()}", "torch": torch.__version__,
               "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    write(arguments.output, {"machine": machine, "peer_timeout": LIMIT, "rows": rows})
    print(table(rows))
    if arguments.table is not None:
        page = arguments.table.read_text(encoding="utf-8")
        marks = re.compile(r"(<!-- faults -->\n).*?(<!-- /faults -->)", re.DOTALL)
        arguments.table.write_text(marks.sub(lambda m: f"{m[1]}{table(rows)}\n{m[2]}", page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
