"""The test suite on every supported release of torch.

    python benchmarks/versions.py [--torch 2.11 --torch newest] [--folder .] [--output results/versions.json] [TESTS...]

For each release an environment of its own, `.venv-<release>`, made once and reused. The other packages are those of
constraints.txt. Test files run one by one, each in a process of its own, so that one that crashes or hangs takes
nothing else with it. Results of files that did not run this time are kept, as long as they are of the same torch.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from records import write as write_document
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
RELEASES = ("2.11", "2.12", "2.13", "2.14", "newest")
OUTCOMES = ("passed", "failed", "skipped")
#: One file may take this long, in seconds.
LIMIT = 900

console = Console()


def main(
    tests: Annotated[list[str] | None, typer.Argument(help="test files or folders; the whole suite if none")] = None,
    torch: Annotated[list[str] | None, typer.Option(help="a release, or newest; may be given more than once")] = None,
    folder: Annotated[Path, typer.Option(help="where the environments are made: about 5 GB each")] = ROOT,
    output: Annotated[Path, typer.Option(help="where the results are written")] = RESULTS,
    prefix: Annotated[str, typer.Option(help="a command put before each run, such as 'nice -n 10'")] = "",
    install: Annotated[bool, typer.Option(help="make the environments that are missing")] = True,
) -> None:
    """Run the suite on every release of torch and print who passed."""
    files = test_files(tests or ["tests"])
    runs = json.loads(output.read_text("utf-8"))["runs"] if output.is_file() else {}
    for release in torch or RELEASES:
        python = environment(folder.resolve(), release, install)
        if python is None:
            console.print(f"[yellow]torch {release}: no environment in {folder}, and none was to be made[/]")
            continue
        run = runs.setdefault(release, {})
        versions = installed(python)
        if run.get("torch") != versions["torch"]:
            run.clear()
        run.update(versions)
        for path in files:
            console.print(f"torch {versions['torch']}: {path}")
            run.setdefault("files", {})[path] = run_file(python, path, shlex.split(prefix))
            write(output, runs)
    console.print(table(runs))
    raise typer.Exit(any(outcome["failed"] for run in runs.values() for outcome in run["files"].values()))


def test_files(given: list[str]) -> list[str]:
    """Test files, relative to the repository's root."""
    found = []
    for name in given:
        path = ROOT / name
        found += sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
    return [str(path.relative_to(ROOT)) for path in found]


# -- environments -----------------------------------------------------------------------------------------------------


def environment(folder: Path, release: str, install: bool) -> Path | None:
    """The Python of the environment for `release`, made where it is missing."""
    place = folder / f".venv-{release}"
    python, ready = place / "bin" / "python", place / ".ready"
    if ready.exists() or not install:
        return python if ready.exists() else None
    console.print(f"making {place} (once; the CUDA builds of torch are several GB)")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch) / "constraints.txt"
        lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        pins.write_text("\n".join(line for line in lines if not line.startswith(("torch", "triton"))))

        def pip(*packages: str) -> None:
            command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", pins, *packages]
            subprocess.run(command, check=True, cwd=ROOT)

        pip("--upgrade", "pip", "setuptools>=70.1", "wheel")
        # torch first: the release asked for must be there before anything else asks for a newer one.
        pip("torch" if release == "newest" else f"torch=={release}.*")
        pip("--no-build-isolation", "-e", ".[demo,test]")
    ready.touch()
    return python


def installed(python: Path) -> dict[str, str]:
    """Versions of what decides: torch, triton, Python."""
    code = (
        "import json, platform, torch\n"
        "try:\n    from triton import __version__ as triton\nexcept ImportError:\n    triton = 'none'\n"
        "print(json.dumps({'torch': torch.__version__, 'triton': triton, 'python': platform.python_version()}))"
    )
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


# -- runs -------------------------------------------------------------------------------------------------------------


def run_file(python: Path, path: str, prefix: list[str]) -> dict[str, Any]:
    """Run one test file: how many tests had which outcome, the names of those that failed, and the seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "junit.xml"
        command = [
            *prefix,
            python,
            "-m",
            "pytest",
            path,
            "-m",
            "not nightly",
            f"--junitxml={log}",
            "-p",
            "no:cacheprovider",
        ]
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        problem = ""
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": search},
                timeout=LIMIT,
                capture_output=True,
                text=True,
            )
            # 5: no test is left once the marks are applied, or the file skips as a whole.
            problem = "" if done.returncode in (0, 1, 5) else f"pytest ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"no end within {LIMIT} s"
        outcome = outcomes(log) if log.is_file() else dict.fromkeys(OUTCOMES, 0) | {"failures": []}
    if problem and not outcome["failed"]:
        outcome["failed"] += 1
        outcome["failures"].append(f"{path}: {problem}")
    for name in outcome["failures"]:
        console.print(f"  [red]failed[/] {name}")
    return outcome | {"seconds": round(time.monotonic() - began, 1), "commit": commit()}


def commit() -> str:
    """The commit that is checked out, or '' outside of a repository."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def outcomes(log: Path) -> dict[str, Any]:
    """The counts in a JUnit file that pytest wrote."""
    cases = ElementTree.parse(log).getroot().iter("testcase")
    counts: dict[str, Any] = dict.fromkeys(OUTCOMES, 0) | {"failures": []}
    for case in cases:
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[outcome] += 1
        if outcome == "failed":
            counts["failures"].append(f"{case.get('classname')}::{case.get('name')}")
    return counts


def write(output: Path, runs: dict[str, Any]) -> None:
    machine = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_document(output, {"machine": machine, "runs": runs})


def table(runs: dict[str, Any]) -> Table:
    """One line for each release, worst news in red."""
    out = Table(title="tpfuse on releases of torch")
    for column in ("release", "torch", "triton", "files", *OUTCOMES, "seconds"):
        out.add_column(column, justify="left" if column in ("release", "torch", "triton") else "right")
    for release in sorted(runs, key=lambda name: (RELEASES.index(name) if name in RELEASES else -1, name)):
        run = runs[release]
        totals = {key: sum(file[key] for file in run["files"].values()) for key in (*OUTCOMES, "seconds")}
        style = "red" if totals["failed"] else "green"
        counts = [str(totals[key]) for key in OUTCOMES]
        files = str(len(run["files"]))
        out.add_row(release, run["torch"], run["triton"], files, *counts, f"{totals['seconds']:.0f}", style=style)
    return out


if __name__ == "__main__":
    typer.run(main)
