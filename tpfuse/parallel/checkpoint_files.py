"""An uncut checkpoint to read from: tensors by name, a .safetensors file, or a folder with some."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpfuse.errors import PlanError
from tpfuse.strict_json import parse, show

# Reads `name` whole, or a part of it: (dim, start, stop).
Reader = Callable[[str, tuple[int, int, int] | None], Tensor]
ShapeOf = Callable[[str], Sequence[int]]


def some(names: Sequence[str]) -> str:
    """The first of many names, for messages."""
    return "nothing" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def opened(source: Mapping[str, Tensor] | str | Path) -> Iterator[tuple[Mapping[str, Any], Reader, ShapeOf]]:
    """(names, reader, shape of a name) of a checkpoint."""
    if isinstance(source, Mapping):
        for name, tensor in source.items():
            if not isinstance(tensor, Tensor):
                raise PlanError(f"the checkpoint has {show(tensor)} under {name!r}; allowed: a tensor")

        def read(name: str, part: tuple[int, int, int] | None) -> Tensor:
            return source[name] if part is None else source[name].narrow(part[0], part[1], part[2] - part[1])

        yield source, read, lambda name: list(source[name].shape)
        return
    if not isinstance(source, (str, os.PathLike)):
        raise PlanError(
            f"load_full_state_dict(source={show(source)}): allowed: tensors by name, a .safetensors file, "
            "or a folder with one"
        )
    with ExitStack() as stack:
        files = {path: stack.enter_context(_safe_open(path)) for path in _files(Path(source))}
        where = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118

        def read_slice(name: str, part: tuple[int, int, int] | None) -> Tensor:
            if part is None:
                return where[name].get_tensor(name)
            index = (slice(None),) * part[0] + (slice(part[1], part[2]),)
            return where[name].get_slice(name)[index].contiguous()

        yield where, read_slice, lambda name: where[name].get_slice(name).get_shape()


def _safe_open(path: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise PlanError(f"{path} is no .safetensors file that can be read: {error}") from error


def _files(path: Path) -> list[str]:
    if path.is_file():
        return [str(path)]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        fields = parse(index.read_bytes(), str(index), PlanError)
        shards = fields.get("weight_map") if isinstance(fields, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise PlanError(f"{index} has no 'weight_map' from weight names to file names")
        names = sorted(set(shards.values()))
        if any(Path(name).name != name or name == ".." for name in names):
            raise PlanError(f"{index} names files outside of its folder: {some(names)}")
        return [str(path / name) for name in names]
    found = sorted(str(p) for p in path.glob("*.safetensors"))
    if not found:
        raise PlanError(f"{path} is no .safetensors file and no folder with any")
    return found
