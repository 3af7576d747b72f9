"""Calls of the symmetric-memory kernels by the million, every result of every call checked on the device.

    torchrun --nproc-per-node 2 benchmarks/stress.py --calls 1000000             linked GPUs, one process each
    torchrun --nproc-per-node 2 benchmarks/stress.py --calls 10000 --plant slot  a fault, to be found
    torchrun ... --calls 10000 --kernels copied exchanged [--plant copy]         of copies alone, on 2 GPUs
    torchrun ... --calls 10000 --kernels backward backward_scattered [--plant copy]    norms' backward, on 2 GPUs
    python benchmarks/stress.py --virtual 2 --calls 100000                       virtual ranks on one GPU
    python benchmarks/stress.py --interpret --calls 200                          Triton's interpreter, no GPU

Twenty CUDA graphs of fifty random calls each (tpfuse.kernels.bench.overlap) are replayed in random order, the same on
all ranks, while each rank spins at places and for times of its own. The host waits for the device once in some hundred
replays, to look at the counters. Appends one line of JSON to --out. Ends with status 0 if nothing was wrong, or with
--plant if the fault was found; else 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "benchmarks" / "results" / "stress.jsonl"
KERNELS = "one_shot", "two_shot", "barrier", "copied", "exchanged", "backward", "backward_scattered"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--graphs", type=int, default=20)
    parser.add_argument("--calls-a-graph", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", choices=("slot", "epoch", "flag", "copy"), help="the last rank is given this fault")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="calls of these alone")
    parser.add_argument("--timeout", type=float, help="seconds that a kernel waits for a peer (30; with --plant 0.5)")
    parser.add_argument("--out", type=Path, default=OUT, help="'-': nowhere")
    parser.add_argument("--virtual", type=int, metavar="RANKS", help="so many ranks on one GPU")
    parser.add_argument("--interpret", action="store_true", help="two ranks as processes, in Triton's interpreter")
    arguments = parser.parse_args()
    if arguments.timeout is None:
        arguments.timeout = 0.5 if arguments.plant else 30.0
    return arguments


ARGUMENTS = parsed() if __name__ == "__main__" else None
if ARGUMENTS is not None and ARGUMENTS.interpret:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is decorated

import torch  # noqa: E402

from tpfuse.kernels.bench.overlap import (  # noqa: E402
    RECIPES,
    ROWS,
    TINY_RECIPES,
    Batch,
    draw_calls,
    make_batch,
    usable,
)
from tpfuse.kernels.bench.overlap_steps import Ledger  # noqa: E402
from tpfuse.kernels.symmetric.timeout import late_ranks, set_timeout  # noqa: E402
from tpfuse.kernels.symmetric.workspace import Workspace  # noqa: E402

Answer = dict[str, Any]


def batches_of(ws: Workspace, ledger: Ledger, args: argparse.Namespace) -> list[Batch]:
    """This rank's part of every graph. The fault, if there is one, is in the first two of the last rank's."""
    recipes, rows = (TINY_RECIPES, (0, 1, 2, 3, 5)) if args.interpret else (RECIPES, ROWS)
    recipes = [recipe for recipe in usable(recipes, ws) if not args.kernels or recipe.kernel in args.kernels]
    if not recipes:
        raise SystemExit(f"{ws.world} ranks make no calls of {', '.join(args.kernels)}")
    batches = []
    for n in range(args.graphs):
        calls = draw_calls(args.seed * 1000 + n, args.calls_a_graph, recipes, rows)
        plant = args.plant if n < 2 and ws.rank == ws.world - 1 else ""
        batches.append(make_batch(ws, ledger, calls, args.seed * 1000 + n, plant=plant or ""))
    return batches


def answer_of(ws: Workspace, ledger: Ledger) -> Answer:
    """What one rank has to say, after the device was waited for."""
    steps, largest = int(ledger.timer[1]), int(ledger.timer[2])
    return {
        "rank": ws.rank, "wrong_rows": ledger.wrong_rows, "first_wrong_call": ledger.first_wrong,
        "gave_up": late_ranks(ws.watch), "mark": int(ledger.tally[2]), "timer_steps_back": steps,
        "largest_step_ns": largest,
    }  # fmt: skip


def trouble(answers: list[Answer]) -> list[str]:
    """What is wrong, in words; nothing if all is right."""
    said = [f"rank {a['rank']}: {a['wrong_rows']} wrong rows, from call {a['first_wrong_call']}" for a in answers
            if a["wrong_rows"]]  # fmt: skip
    said += [f"rank {a['rank']} gave up ranks {sorted(a['gave_up'])}" for a in answers if a["gave_up"]]
    if len({a["mark"] for a in answers}) > 1:
        said.append("ranks hold different bits")
    return said


def replay(args: argparse.Namespace, replays: list[Any], look: Any) -> tuple[int, list[Answer]]:
    """Replay in random order; `look()` waits for the device and gives every rank's answer. Ends early when something is
    wrong, which all ranks see alike. Returns how many calls were made, and the answers."""
    pick = random.Random(args.seed)
    done, answers = 0, []
    between = 2 if args.interpret else 4 if args.plant else 400
    while done < args.calls:
        for _ in range(between):
            if done < args.calls:
                # A fault that was put in is met soon.
                replays[0 if args.plant and done == 0 else pick.randrange(len(replays))]()
                done += args.calls_a_graph
        answers = look()
        if trouble(answers):
            break
    return done, answers


def linked(args: argparse.Namespace) -> tuple[int, list[Answer], Answer] | None:
    """One rank of linked GPUs; None on all ranks but the first."""
    import torch.distributed as dist

    from tpfuse.kernels.bench.linked import LinkedRanks

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank), timeout=datetime.timedelta(seconds=120))
    ranks = LinkedRanks(copies=True)
    ws = ranks.workspaces[0]
    set_timeout(ws.watch, args.timeout)
    ledger = Ledger.on(ws.buffer.device)
    batches = batches_of(ws, ledger, args)
    began = time.monotonic()
    for batch in batches[rank :: ranks.world]:  # ranks share what they compile
        batch.load()
    ranks.gather(None)
    for batch in batches:
        batch.load()
    ranks.gather(None)
    graphs = [captured(batch.run) for batch in batches]
    torch.cuda.synchronize()
    ranks.gather(None)
    compiled = time.monotonic() - began

    def look() -> list[Answer]:
        torch.cuda.synchronize()
        return ranks.gather(answer_of(ws, ledger))

    began = time.monotonic()
    done, answers = replay(args, [graph.replay for graph in graphs], look)
    about = {"setting": f"{ranks.world} {ranks.setting}", "world": ranks.world, "device": ranks.device_name,
             "seconds": round(time.monotonic() - began, 2), "compile_seconds": round(compiled, 1)}  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()
    return (done, answers, about) if rank == 0 else None


def virtual(args: argparse.Namespace) -> tuple[int, list[Answer], Answer]:
    """All ranks of one GPU: each has a stream of its own, and they meet at the end of a graph only."""
    from tpfuse.kernels.bench.virtual import VirtualRanks

    ranks = VirtualRanks(args.virtual)
    batches, ledgers = [], []
    for ws in ranks.workspaces:
        set_timeout(ws.watch, args.timeout)
        ledgers.append(Ledger.on(ws.buffer.device))
        batches.append(batches_of(ws, ledgers[-1], args))
        for batch in batches[-1]:
            batch.load()
    graphs = [captured(lambda n=n: ranks.run([each[n] for each in batches])) for n in range(args.graphs)]

    def look() -> list[Answer]:
        torch.cuda.synchronize()
        return [answer_of(ws, ledger) for ws, ledger in zip(ranks.workspaces, ledgers, strict=True)]

    began = time.monotonic()
    done, answers = replay(args, [graph.replay for graph in graphs], look)
    about = {"setting": f"{args.virtual} virtual ranks", "world": args.virtual, "device": ranks.device_name,
             "seconds": round(time.monotonic() - began, 2)}  # fmt: skip
    return done, answers, about


def captured(run: Any) -> Any:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # NCCL's own thread asks for events while this one captures
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    torch.cuda.synchronize()
    return graph


def interpreted_rank(seat: Any, args: argparse.Namespace) -> tuple[int, Answer]:
    ledger = Ledger.on("cpu")
    batches = batches_of(seat.ws, ledger, args)
    done, [answer] = replay(args, [batch.run for batch in batches], lambda: [answer_of(seat.ws, ledger)])
    return done, answer


def interpreted(args: argparse.Namespace) -> tuple[int, list[Answer], Answer]:
    """Two processes on shared memory. Each looks at its own counters only, and calls that it misses are given up."""
    from tests.kernels.protocol import run

    args.graphs, args.calls_a_graph = min(args.graphs, 3), min(args.calls_a_graph, 10)
    began = time.monotonic()
    patience = 0.2 if args.plant else float("inf")
    played = run(2, interpreted_rank, args, patience=patience, rest=not args.plant, timeout=600)
    about = {"setting": "2 ranks, Triton's interpreter", "world": 2, "device": "cpu",
             "seconds": round(time.monotonic() - began, 2)}  # fmt: skip
    return min(done for ((done, _),) in played), [answer for ((_, answer),) in played], about


def main(args: argparse.Namespace) -> int:
    how = interpreted if args.interpret else virtual if args.virtual else linked
    outcome = how(args)
    if outcome is None:
        return 0
    done, answers, about = outcome
    said = trouble(answers)
    as_expected = bool(said) == bool(args.plant) and (bool(args.plant) or done >= args.calls)
    import triton

    line = {
        "date": time.strftime("%Y-%m-%d"), **about, "torch": torch.__version__, "triton": triton.__version__,
        "seed": args.seed, "graphs": args.graphs, "calls_a_graph": args.calls_a_graph, "calls": done,
        "kernels": args.kernels, "plant": args.plant, "timeout_s": args.timeout,
        "wrong_rows": sum(a["wrong_rows"] for a in answers), "as_expected": as_expected, "ranks": answers,
    }  # fmt: skip
    if str(args.out) != "-":
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    back = sum(a["timer_steps_back"] for a in answers)
    print(f"stress: {about['setting']}, {done} calls in {about['seconds']} s, plant {args.plant}: "
          f"{'; '.join(said) or 'all right'}; {back} backward steps of the timer; "
          f"{'as expected' if as_expected else 'NOT AS EXPECTED'}", flush=True)  # fmt: skip
    return 0 if as_expected else 1


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS or parsed()))
