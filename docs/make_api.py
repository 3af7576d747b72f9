"""Writes docs/api.md from the docstrings of what `import tpfuse` offers.

    python docs/make_api.py            # write it
    python docs/make_api.py --check    # status 1 if it would change
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tpfuse

PAGE = Path(__file__).with_name("api.md")
HEAD = """# API

Every public name, from its docstring; written by `python docs/make_api.py`.
"""


def entry(name: str, value: object) -> str:
    """The heading, signature and docstring of one name."""
    kind = "class" if inspect.isclass(value) else "def"
    own_signature = not (inspect.isclass(value) and issubclass(value, Exception))
    signature = f"{kind} {name}{inspect.signature(value)}" if own_signature else f"class {name}"  # type: ignore[arg-type]
    return f"## `{name.removeprefix('tpfuse.')}`\n\n```\n{signature}\n\n{inspect.getdoc(value)}\n```\n"


def page() -> str:
    names = [name for name in tpfuse.__all__ if not inspect.ismodule(getattr(tpfuse, name))]
    entries = [entry(f"tpfuse.{name}", getattr(tpfuse, name)) for name in names]
    operations = [name for name in vars(tpfuse.ops) if name.startswith("all_reduce_add_")]
    entries += [entry(f"tpfuse.ops.{name}", getattr(tpfuse.ops, name)) for name in operations]
    return "\n".join([HEAD, *entries])


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
