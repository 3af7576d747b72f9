"""`python -m tpfuse.demo`: real Hugging Face architectures, cut over two processes, before and after tpfuse.

Nothing is downloaded: the models are tiny and their weights are random. Two processes load each of them with
`tp_plan="auto"`, run it in eager mode, compile it with the tpfuse backend, run it again and compare. A third, single
process computes the same model in float64 and says how far both are from it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..report import Report
from . import demo_models, drawing
from .demo_models import FAMILIES, Family

WORLD = 2
#: Seconds after which ranks that have not answered are given up.
TIMEOUT = 540.0
#: A rewrite may cost this factor in error against float64, plus one rounding of bfloat16.
ERROR_FACTOR, ROUNDING = 1.1, 2.0**-9

_BEGAN = time.monotonic()


class DemoError(Exception):
    """Something the demo promises did not hold."""


@dataclass(frozen=True)
class Setup:
    """Where the ranks run. `device`: "cpu" or "cuda"; `shared`: all ranks on one GPU."""

    device: str
    backend: str
    shared: bool
    inner: str

    def describe(self) -> str:
        if self.device == "cpu":
            return f"{WORLD} processes on the CPU, gloo"
        place = "sharing one GPU" if self.shared else "one GPU each"
        return f"{WORLD} processes {place} ({torch.cuda.get_device_name()}), {self.backend}"


@dataclass(frozen=True)
class Result:
    """What one rank saw of one model. `eager` and `ours` count what really ran, by name."""

    reports: list[Report]
    eager: dict[str, int]
    ours: dict[str, int]
    eager_logits: Any
    our_logits: Any
    seconds: float


def progress(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", flush=True)


def choose_setup() -> Setup:
    """NCCL with a GPU for each rank, gloo over one shared GPU, else the CPU."""
    if torch.cuda.is_available():
        shared = torch.cuda.device_count() < WORLD
        return Setup("cuda", "gloo" if shared else "nccl", shared, "inductor")
    problem = demo_models.why_inductor_cannot_compile_for_cpu()
    if problem:
        progress(f'{problem}: Inductor cannot compile for this CPU, so the demo uses options={{"inner": "aot_eager"}}')
    return Setup("cpu", "gloo", False, "aot_eager" if problem else "inductor")


# -- one rank ---------------------------------------------------------------------------------------------------------


def _rank_main(rank: int, setup: Setup, folder: str, families: list[str], results: Any) -> None:
    """Puts (rank, family, Result) for each model, (0, "", text) for progress, (rank, None, traceback) at an error."""

    def say(text: str) -> None:
        if rank == 0:
            results.put((rank, "", text))

    faulthandler.enable()
    try:
        _quiet()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK="0" if setup.shared else str(rank))
        torch.set_num_threads(max(1, (os.cpu_count() or WORLD) // WORLD))
        if setup.device == "cuda":
            torch.cuda.set_device(0 if setup.shared else rank)
            if setup.shared:
                _repair = demo_models.repair_gloo_all_gather()  # kept until this process ends
        dist.init_process_group(setup.backend, init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
        for name in families:
            results.put((rank, name, _run_model(setup, FAMILIES[name], folder, say)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _run_model(setup: Setup, family: Family, folder: str, report: Callable[[str], None]) -> Result:
    import tpfuse

    def say(text: str) -> None:
        report(f"{family.title}: {text}")

    say(f'loading with tp_plan="auto" on {WORLD} ranks')
    model = demo_models.load_sharded(os.path.join(folder, family.name))
    ids = demo_models.token_ids().to(setup.device)

    def run(call: Callable[..., Any]) -> torch.Tensor:
        with torch.no_grad():
            return call(input_ids=ids, use_cache=False).logits

    say("running in eager mode")
    run(model)
    eager, eager_counts = _counted(lambda: run(model))

    say(f'compiling with backend="tpfuse" (inner="{setup.inner}")')
    torch.compiler.reset()
    seen = len(tpfuse.reports())
    start = time.monotonic()
    compiled = torch.compile(model, backend=_backend(), options={"inner": setup.inner})
    run(compiled)
    seconds = time.monotonic() - start
    say(f"compiled in {seconds:.1f} s; running it again and counting collectives")
    ours, our_counts = _counted(lambda: run(compiled))
    eager_logits, our_logits = (tensor.float().cpu().numpy() for tensor in (eager, ours))
    return Result(tpfuse.reports()[seen:], eager_counts, our_counts, eager_logits, our_logits, seconds)


def _backend() -> str | Callable[..., Any]:
    """The backend's name, or the function itself where tpfuse is imported from a source tree that is not installed."""
    if "tpfuse" in torch.compiler.list_backends(exclude_tags=()):
        return "tpfuse"
    from ..backend import tpfuse

    return tpfuse


def _counted(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, int]]:
    """The result, and how often each collective and each fused operation ran, counted by the profiler."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with _without_stderr():  # some builds announce every start and stop
        profile.start()
    result = call()
    with _without_stderr():
        profile.stop()
    counts: dict[str, int] = {}
    for event in profile.events():
        if event.name.startswith("c10d::"):
            kind = "all_reduce" if "allreduce" in event.name else event.name.removeprefix("c10d::").strip("_")
        elif event.name == "tpfuse::all_reduce_norm":
            kind = "fused"
        else:
            continue
        counts[kind] = counts.get(kind, 0) + 1
    return result, counts


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what C++ code writes to the standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _quiet() -> None:
    """Only tpfuse's own warnings are of interest here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", module=r"torch\..*|transformers\..*")
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.disable_progress_bar()


# -- all ranks --------------------------------------------------------------------------------------------------------


def run_ranks(setup: Setup, folder: str, families: list[str]) -> Any:
    """Yields (family, results in rank order) as the ranks finish each model.

    Raises DemoError when a rank raises, dies or does not answer in time.
    """
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_rank_main, args=(r, setup, folder, families, results), daemon=True)
        for r in range(WORLD)
    ]
    for process in processes:
        process.start()
    try:
        answers: dict[str, dict[int, Result]] = {name: {} for name in families}
        deadline = time.monotonic() + TIMEOUT
        for name in families:
            while len(answers[name]) < WORLD:
                rank, family, value = _next(results, processes, deadline)
                if family is None:
                    raise DemoError(f"rank {rank} raised:\n{value}")
                if family == "":
                    progress(value)
                else:
                    answers[family][rank] = value
            yield name, [answers[name][rank] for rank in range(WORLD)]
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


def _next(results: Any, processes: list[Any], deadline: float) -> tuple[int, str | None, Any]:
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            dead = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
            if dead:
                raise DemoError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                raise DemoError(f"the ranks did not finish within {TIMEOUT:.0f} s") from None


# -- what is shown ----------------------------------------------------------------------------------------------------


def show(family: Family, results: list[Result], reference: Any) -> tuple[int, int]:
    """Print one model's findings; returns (fused, all-reduces that feed a norm).

    Raises DemoError where the numbers or the counts are not what they must be.
    """
    first = results[0]
    boundaries = [b for report in first.reports for b in report.boundaries]
    norms = sum(report.norms for report in first.reports)
    feeding = [b for b in boundaries if b.collective == "all_reduce" and b.feeds_norm]
    fused = sum(b.fused for b in feeding)
    errors = {name: _relative_error(logits, reference) for name, logits in _logits(first).items()}
    fused_ops, in_kernels = first.ours.get("fused", 0), _in_kernels(first)
    difference = abs(first.our_logits - first.eager_logits).max()

    print(f"\n== {family.title} " + "=" * max(0, 100 - len(family.title)))
    for report in first.reports:
        print(_table(report))
    rows = [
        ("", "eager", "tpfuse"),
        ("all-reduces that ran", first.eager.get("all_reduce", 0), first.ours.get("all_reduce", 0) + in_kernels),
        ("  of them inside a fused operation", 0, fused_ops),
        ("  of them in one kernel with the norm", 0, in_kernels),
        ("other collectives that ran", _others(first.eager), _others(first.ours)),
        ("norms on their own", norms, norms - fused_ops),
        ("relative L2 error against float64", f"{errors['eager']:.2e}", f"{errors['tpfuse']:.2e}"),
    ]
    for label, before, after in rows:
        print(f"  {label:<38}{before!s:>10}{after!s:>10}")
    print(f"  largest difference from eager: {difference:.2e} (largest logit: {abs(reference).max():.2f})")
    print(f"  compile time of the first call: {first.seconds:.1f} s\n", flush=True)
    _check(family, results, fused, len(feeding), errors)
    return fused, len(feeding)


def _table(report: Report) -> str:
    """The report's own table, or plain lines where the package that draws it (rich) is missing."""
    try:
        return str(report)
    except ImportError:
        verdicts = [f"  {b.kind}, {b.module}, {b.collective}: {b.rewrite or b.reason}" for b in report.boundaries]
        return "\n".join([report.summary(), *verdicts])


def _check(family: Family, results: list[Result], fused: int, feeding: int, errors: dict[str, float]) -> None:
    first = results[0]
    if len(first.reports) > 1:
        raise DemoError(f"{family.title}: graph breaks cut the model into {len(first.reports)} graphs")
    expected = sum(report.collectives_after for report in first.reports)
    ran = sum(count for kind, count in first.ours.items() if kind != "fused") + _in_kernels(first)
    if ran != expected:
        raise DemoError(f"{family.title}: {ran} collectives ran, but the report says that {expected} are left")
    if fused < max(family.must_fuse, feeding - family.may_miss):
        wanted = max(family.must_fuse, feeding - family.may_miss)
        raise DemoError(f"{family.title}: {fused} of {feeding} all-reduces before a norm fused, expected {wanted}")
    if any((result.our_logits != first.our_logits).any() for result in results):
        raise DemoError(f"{family.title}: the ranks disagree about the logits")
    allowed = ERROR_FACTOR * errors["eager"] + ROUNDING
    if not errors["tpfuse"] <= allowed:
        raise DemoError(f"{family.title}: relative error {errors['tpfuse']:.2e}, allowed are {allowed:.2e}")


def _in_kernels(result: Result) -> int:
    """All-reduces that ran in one kernel with their norm, where the profiler's c10d events do not show them. A demo
    model has one hidden size and one group, so its fused operations all run alike."""
    kernels = {b.kernel for report in result.reports for b in report.boundaries if b.fused}
    return result.ours.get("fused", 0) if kernels == {True} else 0


def _logits(result: Result) -> dict[str, Any]:
    return {"eager": result.eager_logits, "tpfuse": result.our_logits}


def _others(counts: dict[str, int]) -> int:
    return sum(count for kind, count in counts.items() if kind not in ("all_reduce", "fused"))


def _relative_error(got: Any, reference: Any) -> float:
    difference = got.astype("float64") - reference
    return float((difference**2).sum() ** 0.5 / (reference**2).sum() ** 0.5)


def run(families: list[str] | None = None, output: Path = Path("demo-output")) -> str:
    """The whole demo; returns its last line. Raises DemoError."""
    families = families or list(FAMILIES)
    _quiet()
    progress(f"torch {torch.__version__}, transformers {demo_models.transformers_version()}")
    setup = choose_setup()
    progress(setup.describe())
    references, drawn = {}, []
    fused = feeding = 0
    with tempfile.TemporaryDirectory(prefix="tpfuse-demo-") as folder:
        # A compile cache of its own: every run shows what a first run shows.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")
        for name in families:
            progress(f"{FAMILIES[name].title}: random weights, saved; float64 reference on one process")
            references[name] = demo_models.save_with_reference(FAMILIES[name], os.path.join(folder, name))
        progress(f"starting {WORLD} processes")
        for name, results in run_ranks(setup, folder, families):
            family = FAMILIES[name]
            got, possible = show(family, results, references[name])
            fused, feeding = fused + got, feeding + possible
            drawn.append((family.title, [b for report in results[0].reports for b in report.boundaries]))
    picture = drawing.draw(drawn, output)
    progress(f"picture: {picture}" if picture else "no picture: matplotlib is not installed (pip install matplotlib)")
    return f"demo: OK {fused}/{feeding} fused"


def main() -> int:
    try:
        print(run())
    except DemoError as error:
        print(f"demo: FAILED: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
