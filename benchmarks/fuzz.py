"""Random programs with values that are a rank's own (tests/own_programs.py), many of them, on gloo ranks of this host.

    python benchmarks/fuzz.py --seeds 0:2000 --ranks 2 --jobs 30 [--minutes 8] [--output FILE]
    python benchmarks/fuzz.py --seeds 0:2000 --ranks 2 --shard 3/32            one share of them, in one pair of ranks

Seeds from 1000000 on are spellings of the same kinds, written down (tests/own_spellings.py): 1000000:COUNT has all.
Those from 2000000 on are all trained, and their gradients are summed in front of norms' backward passes.

Prints a line of JSON for each program that is wrong on a rank, raises, or does not end, and a last line on all of them;
exit status 1 if there was one. `--output` appends the last line to a file (benchmarks/results/fuzz.jsonl). Programs
whose turn did not come within `--minutes` are counted in `left`, and `next` is the first of them.

`shares`: how many programs have a tensor whose error is above so many times its bound's unit, which is the unfused
graph's error, one rounding of the output and one more of each partial sum (`own_fuzz.SLACK` of these is wrong).
`float32_over_unfused`: geometric mean over all tensors of errors in float32 over those of the unfused graph, a rounding
added to both. Nothing but the torch that is installed is needed, no port and no GPU; ranks meet in temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are copies of one process, which CUDA does not survive
os.environ.setdefault("OMP_NUM_THREADS", "1")
TREE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TREE)]

from machine import cpu_machine  # noqa: E402

from tests import own_fuzz  # noqa: E402
from tests.own_programs import draw  # noqa: E402
from tests.own_spellings import COUNT, FIRST  # noqa: E402
from tests.ranks import run_processes  # noqa: E402

#: Programs that one pair of ranks runs before it is made anew.
CHUNK = 10
SHARES = (1.0, 1.1, 2.0, own_fuzz.SLACK)
#: How a kind of value is told in a program's text.
KINDS = {
    "sizes of a rank's own": ("own_size", "R % 2"), "gathered gates": ("(ag(",), "operators that ask": ("* asked(",),
    "operators that do not": ("unasked(",), "an earlier norm": ("ar(y.cos()",), "a sum in two": (").view(",),
    "scattered rows": (" rs(",),
}  # fmt: skip


def main() -> int:
    args = _arguments()
    began = time.monotonic()
    total = _merged(_shares(args)) if args.jobs > 1 else _share(args)
    total["wall_seconds"] = round(time.monotonic() - began, 1)
    if args.shard_of_a_job:
        print(json.dumps({"share": total}), flush=True)
        return 0
    line = json.dumps({**_settings(args), **_said(total), "machine": cpu_machine()})
    print(line)
    if args.output:
        with open(args.output, "a") as file:
            file.write(line + "\n")
    return int(bool(total["wrong"] or total["raised"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:100", help="FIRST:END")
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4))
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth of the seeds, from the Ith on")
    parser.add_argument("--jobs", type=int, default=1, help="shares that run side by side")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--patience", type=float, default=150.0, help="seconds that a share waits for its programs")
    parser.add_argument("--short", action="store_true", help="one round a program, seldom trained")
    parser.add_argument("--inner", default="aot_eager", choices=("aot_eager", "inductor", "traced"))
    parser.add_argument("--no-agreement", action="store_true", help="every ballot of the ranks is a yes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shard-of-a-job", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("seeds", "ranks", "shard", "short", "inner")
    return {**{name: getattr(args, name) for name in names}, "agreement": not args.no_agreement}


# -- many shares at a time --------------------------------------------------------------------------------------------


def _shares(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).resolve()), "--shard-of-a-job"]
    command += [f"--{name}={getattr(args, name)}" for name in ("seeds", "ranks", "minutes", "patience", "inner")]
    command += [f"--{name.replace('_', '-')}" for name in ("short", "no_agreement") if getattr(args, name)]
    index, count = map(int, args.shard.split("/"))
    shards = [f"--shard={index + count * job}/{count * args.jobs}" for job in range(args.jobs)]
    running = [
        subprocess.Popen([*command, shard], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for shard in shards
    ]
    for shard, process in zip(shards, running, strict=True):
        share = None
        for line in process.communicate()[0].splitlines():
            found = json.loads(line) if line.startswith("{") else {}
            share = found.get("share", share)
            if "seed" in found:
                print(line, flush=True)
        if share is None:
            print(json.dumps({"share_without_an_answer": shard, "status": process.returncode}), flush=True)
            share = {**_nothing(), "raised": [-1]}
        yield share


def _nothing() -> dict[str, Any]:
    return {
        "programs": 0, "wrong": [], "raised": [], "left": 0, "next": None, "log_ratios": [0.0, 0], "shares": {},
        "rewrites": {}, "kinds": {}, "apart": 0, "trained": 0, "slowest": 0.0, "cpu_seconds": 0.0,
    }  # fmt: skip


def _merged(shares: Iterator[dict[str, Any]]) -> dict[str, Any]:
    total = _nothing()
    for share in shares:
        for name in ("programs", "wrong", "raised", "left", "apart", "trained", "cpu_seconds"):
            total[name] += share[name]
        total["log_ratios"] = [a + b for a, b in zip(total["log_ratios"], share["log_ratios"], strict=True)]
        for name in ("shares", "rewrites", "kinds"):
            total[name] = dict(Counter(total[name]) + Counter(share[name]))
        total["slowest"] = max(total["slowest"], share["slowest"])
        total["next"] = min((n for n in (total["next"], share["next"]) if n is not None), default=None)
    return total


def _said(total: dict[str, Any]) -> dict[str, Any]:
    logs, count = total.pop("log_ratios")
    mean = round(exp(logs / count), 4) if count else None
    return {**total, "wrong": sorted(total["wrong"]), "raised": sorted(total["raised"]), "float32_over_unfused": mean}


# -- one share --------------------------------------------------------------------------------------------------------


def _share(args: argparse.Namespace) -> dict[str, Any]:
    first, end = (int(word) if word != "COUNT" else FIRST + COUNT for word in args.seeds.split(":"))
    index, count = map(int, args.shard.split("/"))
    seeds = list(range(first, end))[index::count]
    until = time.monotonic() + 60 * args.minutes
    total = _nothing()
    with tempfile.TemporaryDirectory() as scratch:
        while seeds and time.monotonic() < until:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            chunk, left = seeds[:CHUNK], max(1.0, until - time.monotonic())
            error = _run(args, chunk, folder, min(args.patience + 20 * len(chunk), left + 60))
            done = _done(folder, args.ranks)
            for seed in (seed for seed in chunk if seed in done):
                _count(total, draw(seed, args.short), done[seed])
            seeds = [seed for seed in seeds if seed not in done]
            if error and seeds and (time.monotonic() < until or "# seed" in error):
                bad = _culprit(error, folder, seeds)
                total["raised"].append(bad)
                drawn = draw(bad, args.short)
                print(json.dumps({"seed": bad, "raised": error[-4000:], "program": str(drawn)}), flush=True)
                seeds.remove(bad)
    total["left"], total["next"] = len(seeds), seeds[0] if seeds else None
    return total


def _run(args: argparse.Namespace, seeds: Sequence[int], folder: Path, timeout: float) -> str:
    """'' or the error that ended it."""
    how = (list(seeds), str(folder), args.short, not args.no_agreement, args.inner)
    try:
        run_processes(args.ranks, own_fuzz.run, args.ranks, *how, timeout=timeout)
    except (RuntimeError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _done(folder: Path, ranks: int) -> dict[int, list[dict]]:
    """By seed, what each rank found, for programs that all of them ended."""
    files = [folder / f"done{rank}" for rank in range(ranks)]
    if not all(file.exists() for file in files):
        return {}
    each = [{(found := json.loads(line))["seed"]: found for line in file.read_text().splitlines()} for file in files]
    return {seed: [found[seed] for found in each] for seed in each[0] if all(seed in found for found in each)}


def _culprit(error: str, folder: Path, seeds: Sequence[int]) -> int:
    """The program that a rank raised in, or, of those that ranks were at, the first."""
    named = [int(word) for word in re.findall(r"# seed (\d+)", error) if int(word) in seeds]
    at = [int(file.read_text() or -1) for file in folder.glob("rank*")]
    return named[0] if named else min((seed for seed in at if seed in seeds), key=seeds.index, default=seeds[0])


def _count(total: dict[str, Any], drawn: Any, ranks: list[dict]) -> None:
    total["programs"] += 1
    total["trained"] += drawn.train
    total["cpu_seconds"] = round(total["cpu_seconds"] + sum(found["cpu_seconds"] for found in ranks), 2)
    total["apart"] += ranks[0]["apart"]
    total["slowest"] = max(total["slowest"], round(max(found["seconds"] for found in ranks), 1))
    worst = max(share for found in ranks for share in found["shares"])
    kinds = {kind for kind, words in KINDS.items() if any(word in drawn.text for word in words)}
    total["kinds"] = dict(Counter(total["kinds"]) + Counter(kinds))
    total["shares"] = dict(Counter(total["shares"]) + Counter(f"above {s:g}" for s in SHARES if worst > s))
    total["rewrites"] = dict(Counter(total["rewrites"]) + Counter(ranks[0]["rewrites"]))
    ratios = [ratio for found in ranks for ratio in found["ratios"] if ratio > 0]
    logs, count = total["log_ratios"]
    total["log_ratios"] = [logs + sum(map(log, ratios)), count + len(ratios)]
    if any(found["wrong"] for found in ranks):
        total["wrong"].append(drawn.seed)
        wrong = [found["wrong"].get(str(drawn.seed), []) for found in ranks]
        what = "by rank: tensor, error, that of the unfused graph, that of one more rounding"
        print(json.dumps({"seed": drawn.seed, "wrong": wrong, "what": what, "program": str(drawn)}), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
