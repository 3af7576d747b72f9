"""What a process remembers stands in one module, with an owner and a lock for each item."""

from __future__ import annotations

import ast

import pytest

from tests.test_rooms import ROOT, imported, modules

STATE = "tpfuse._state"
#: Classes whose objects are made to be changed.
CHANGED = {"dict", "list", "set", "defaultdict", "deque", "OrderedDict", "Counter", "WeakKeyDictionary", "WeakSet",
           "WeakValueDictionary", "Lock", "RLock", "Condition", "Event", "local", "ContextVar", "count"}  # fmt: skip
CHANGES = {"append", "add", "update", "pop", "popitem", "setdefault", "clear", "remove", "discard", "extend", "insert"}
CACHES = {"lru_cache", "cache"}

#: What stands elsewhere, and why.
ELSEWHERE = {
    ("tpfuse.strict_json", "_hints"): "a cache of a pure function",
    ("tpfuse.parallel.outside", "_say_how_far"): "a warning is said once; nothing is decided by whether it was",
    ("tpfuse._torch_private.operators", "defaults_of"): "a cache of a pure function: operators keep their schemas",
    ("kernels.add_norm", "tuning"): "a cache of a pure function",
    ("passes.verdict.names", "clean_path"): "a cache of a pure function",
    ("passes.verdict.names", "role_of_name"): "a cache of a pure function",
    ("kernels.quantise_program", "encoded"): "a cache of a pure function",
    ("kernels.quantise_program", "converts_fp8"): "a cache of a pure function: a card keeps its capability",
    ("tpfuse.quantisation", "read_quantisation"): "a cache of a pure function",
    ("kernels.symmetric.operands", "_constants"): "a cache of a pure function",
    ("kernels.symmetric.dispatch", "choose"): "a cache of a function of the process's table",
    ("kernels.symmetric.dispatch", "default_table"): "the user's table is read once, for all groups alike",
    ("kernels.rendezvous", "WORKSPACE_REGISTRY"): "the memory that ranks share, beside the code that maps it",
    ("kernels.rendezvous", "CAPTURED"): "as above",
    ("kernels.rendezvous", "_LOCKS"): "as above",
    ("tpfuse.product_ops", "_dtype_of_x"): "a cache of a pure function",
    ("kernels.driver", "driver"): "functions of a library that is loaded once",
    ("kernels.symmetric.copies", "_LANES"): "a stream and events for each workspace, which go with it",
    ("kernels.symmetric.operands", "COMPILED_REGISTRY"): "compiled kernels, beside the code that launches them",
}


def called(node: ast.AST) -> str:
    if isinstance(node, ast.Call):
        return called(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return called(node.value) if isinstance(node, ast.Subscript) else getattr(node, "id", "")


def names_changed(tree: ast.Module) -> set[str]:
    """Names that are changed in place, or rebound from within a function, anywhere in the module."""
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            found.add(called(node.func.value))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            found.add(called(node.value))
    return found


def remembered(tree: ast.Module) -> set[str]:
    """The names of what outlives a call and can change: at the top of a module, in a class, and behind a cache."""
    changed, found = names_changed(tree), set()
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and not is_frozen(node)}
    for place in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        for node in statements(place.body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None)
            for name in (t.id for t in targets if isinstance(t, ast.Name)):
                made = isinstance(value, ast.Call) and called(value) in CHANGED | CACHES | own
                if not name.startswith("__") and (is_empty(value) or made or (place is tree and name in changed)):
                    found.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(called(one) in CACHES for one in node.decorator_list):
            found.add(node.name)
    return found


def is_empty(value: ast.AST | None) -> bool:
    """Whether it is a list or a dict with nothing in it, which is only good for being filled."""
    return (isinstance(value, ast.Dict) and not value.keys) or (isinstance(value, ast.List) and not value.elts)


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Those that run on import, branches included."""
    found = []
    for node in body:
        found += [node] if isinstance(node, (ast.Assign, ast.AnnAssign)) else []
        for name in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.For)):
                found += statements(getattr(node, name, []))
    return found


def is_frozen(node: ast.ClassDef) -> bool:
    """Whether its objects cannot change: frozen, an enumeration, an error, or a type for others."""
    bases = {called(base) for base in node.bases}
    return any("frozen=True" in ast.unparse(one) for one in node.decorator_list) or bool(bases & {"Enum", "NamedTuple"})


def test_what_can_change_stands_in_the_module_for_state():
    found = {
        (module, name)
        for module, path in modules().items()
        if module != STATE
        for name in remembered(ast.parse(path.read_text("utf-8")))
    }
    assert found == set(ELSEWHERE)


def test_every_item_names_its_owner_and_its_lock():
    tree, lines = ast.parse((ROOT / "tpfuse/_state.py").read_text("utf-8")), []
    source = (ROOT / "tpfuse/_state.py").read_text("utf-8").splitlines()
    known = modules()
    for node in statements(tree.body):
        name = ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
        above = ""
        for line in reversed(source[: node.lineno - 1]):
            if not line.startswith("#:"):
                break
            above = f"{line.removeprefix('#:')} {above}"
        owner = above.partition("Owner: ")[2].partition(" ")[0].rstrip(".").removeprefix("tpfuse.passes")
        owner = f"passes{owner}" if owner.startswith(".") else owner
        if name != "LOCK" and (owner not in known or not ("Lock: " in above or name.endswith("ING"))):
            lines.append(name)
        elif name != "LOCK":
            assert STATE in {module.rpartition(".")[0] if module not in known else module
                             for module in imported(owner, known[owner])}, f"{owner} does not use {name}"  # fmt: skip
    assert not lines


@pytest.mark.parametrize("source", [
    "_SEEN: dict[str, int] = {}",
    "import threading\n_LOCK = threading.Lock()",
    "class Count:\n    n = 0\nCOUNT = Count()",
    "class Model:\n    seen = []",
    "TABLE = {'a': 1}\ndef f():\n    TABLE['b'] = 2",
    "N = 0\ndef f():\n    global N\n    N = 1",
    "import functools\n@functools.lru_cache\ndef f(x):\n    return x",
    "if True:\n    KNOWN = set()",
])  # fmt: skip
def test_a_new_item_elsewhere_is_found(source):
    assert remembered(ast.parse(source))


def test_constants_are_no_state():
    assert not remembered(ast.parse("NAMES = {'a': 1}\nORDER = ['a']\ndef f():\n    found = []\n    found.append(1)"))
