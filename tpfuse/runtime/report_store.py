"""Reports beside Inductor's caches: on a warm cache nothing is traced, so the pass cannot make its report again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .._torch_private import inductor_cache_dir
from ..errors import OptionError
from ..passes.verdict.sent import shifted
from ..report import Report


def key(gm: fx.GraphModule, example_inputs: Sequence[Any], pass_key: bytes | None, settings: str | None) -> str | None:
    """Names the report on this graph with these inputs under this pass and these settings of Inductor; None where the
    caches are bypassed.

    To be computed before compiling, which takes the graph over, and of the pass as it will run, with the user's own in
    front of it.
    """
    if pass_key is None or settings is None:
        return None
    facts = [
        settings,
        pass_key.hex(),
        gm.print_readable(print_output=False, include_stride=True, include_device=True),
        repr([_describe(value) for value in example_inputs]),
        repr([(name, _describe(value)) for name, value in gm.named_parameters()]),
        repr(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.is_autocast_enabled("cuda"),
            )
        ),
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def _describe(value: Any) -> tuple:
    if isinstance(value, torch.Tensor):
        return (
            type(value).__name__,
            str(value.dtype),
            tuple(map(str, value.shape)),
            value.requires_grad,
            str(value.device),
        )
    return type(value).__name__, str(value)


def save(name: str | None, report: Report) -> None:
    """Written to a file of its own first, so that a reader on another rank never sees half a report."""
    if name is None:
        return
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(report.to_json(), encoding="utf-8")
        scratch.replace(path)
    except OSError:
        return  # a cache that cannot be written is a cache miss later, not an error now


def load(name: str | None) -> Report | None:
    if name is None:
        return None
    try:
        return Report.from_json(_path(name).read_bytes())
    except (OSError, OptionError):
        return None


def _path(name: str) -> Path:
    return Path(inductor_cache_dir()) / "tpfuse" / f"{name}.json"


def merge(reports: Sequence[Report]) -> Report:
    """One report for a compiled graph whose subgraphs were rewritten one by one."""
    if len(reports) == 1:
        return reports[0]
    return Report(
        boundaries=[boundary for report in reports for boundary in report.boundaries],
        norms=sum(report.norms for report in reports),
        collectives_after=sum(report.collectives_after for report in reports),
        notes=[note for report in reports for note in report.notes],
        steps=[
            replace(step, sends=shifted(step.sends, sum(len(before.boundaries) for before in reports[:i])))
            for i, report in enumerate(reports)
            for step in report.steps
        ],
    )
