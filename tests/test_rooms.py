"""Which room may import from which: data flows one way, and no two modules wait for each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: What a module of a room may import from, besides its own room.
MAY = {
    "passes.facts": {"tpfuse"},
    "passes.recognise": {"tpfuse", "passes.facts", "passes.verdict.accounting"},
    "passes.plan": {"tpfuse", "passes.facts", "passes.recognise"},
    "passes.rewrite": {"tpfuse", "passes.facts", "passes.recognise", "passes.plan", "passes.verdict"},
    "passes.verdict": {"tpfuse", "passes.facts", "passes.recognise", "passes.plan", "kernels.entry"},
    "kernels.symmetric": {"tpfuse", "kernels"},
    "kernels.bench": {"tpfuse", "kernels", "kernels.symmetric"},
    "tpfuse.parallel": {"tpfuse", "passes.facts", "passes.verdict.names"},
    "tpfuse.runtime": {"tpfuse", "kernels", "passes.facts", "passes.verdict"},
}


def modules() -> dict[str, Path]:
    files = [path for top in ("tpfuse", "passes", "kernels") for path in (ROOT / top).rglob("*.py")]
    plain = [
        path for path in files if path.relative_to(ROOT).parts[:2] not in (("tpfuse", "passes"), ("tpfuse", "kernels"))
    ]
    return {name_of(path): path for path in plain}


def name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(name: str, path: Path, tree: ast.AST | None = None) -> set[str]:
    """The modules of ours that a module imports, wherever in it (or in this part of it) the import stands."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree or ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            found.update({whole, *(f"{whole}.{alias.name}" for alias in node.names)})
    return {ours(each) for each in found}


def ours(name: str) -> str:
    """`tpfuse.passes.x` and what a relative import inside `passes` gives are one module."""
    return name.removeprefix("tpfuse.") if name.startswith(("tpfuse.passes", "tpfuse.kernels")) else name


def room_of(name: str) -> str:
    parts = name.split(".")
    rooms = [room for room in MAY if name.startswith(f"{room}.") or name == room]
    return max(rooms, key=len) if rooms else parts[0]


@pytest.mark.parametrize("room", MAY)
def test_a_room_imports_only_from_below(room):
    known = modules()
    wrong = []
    for name, path in known.items():
        if room_of(name) != room:
            continue
        for other in imported(name, path) & set(known):
            allowed = {room_of(other), other} & (MAY[room] | {room})
            if not allowed:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_the_passes_import_neither_parallel_nor_runtime():
    known = modules()
    passes = {name: path for name, path in known.items() if name.startswith("passes")}
    above = {f"{name} imports {other}" for name, path in passes.items() for other in imported(name, path)
             if other.startswith(("tpfuse.parallel", "tpfuse.runtime", "tpfuse.cli", "tpfuse.backend"))}  # fmt: skip
    assert not above


def test_a_file_holds_one_idea_in_at_most_400_lines():
    tops = ("tpfuse", "passes", "kernels", "tests", "benchmarks")
    files = {path.relative_to(ROOT) for top in tops for path in (ROOT / top).rglob("*.py")}
    files = {path for path in files if path.parts[:2] not in (("tpfuse", "passes"), ("tpfuse", "kernels"))}
    counts = {str(path): len((ROOT / path).read_text("utf-8").splitlines()) for path in files}
    assert not {path: lines for path, lines in counts.items() if lines > 400}


def test_no_two_modules_wait_for_each_other():
    """Imports inside functions are left out, which run when both modules are there, and packages, which hand on."""
    known = {name: path for name, path in modules().items() if path.name != "__init__.py"}
    above = {name: {o for o in imported_at_once(name, path) & set(known) if o != name} for name, path in known.items()}
    while leaves := [name for name, others in above.items() if not others & set(above)]:
        for name in leaves:
            del above[name]
    assert not above, "these import each other in a circle"


def imported_at_once(name: str, path: Path) -> set[str]:
    """What is imported when the module is."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_for_types_only(node):
            node.body = []
    return imported(name, path, tree)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
