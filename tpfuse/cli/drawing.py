"""Draw the boundaries of compiled models before and after: one row for each boundary, one picture for all models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import Boundary

_BEFORE, _AFTER, _CONSUMER, _WIDTH = 3.9, 8.5, 11.95, 13.3
_ROW, _BOX, _GAP = 0.5, 0.34, 0.24
_INK, _FAINT = "#1f2933", "#7b8794"
_COLOURS = {"collective": "#e8743b", "add": "#8e9aaf", "norm": "#3d7dca", "fused": "#2a9d6f", "left": "#d9dee5"}
_NAMES = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm", None: ""}


def draw(models: Sequence[tuple[str, Sequence[Boundary]]], folder: Path) -> Path | None:
    """Write `folder`/boundaries.png: `models` are titles with their reports' boundaries.

    Returns the file, or None where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    grouped = [(title, groups(boundaries)) for title, boundaries in models]
    height = 0.8 + sum(0.85 + _ROW * sum(map(len, rows)) for _, rows in grouped)
    figure = pyplot.figure(figsize=(_WIDTH, height), facecolor="white")
    canvas = _Canvas(figure.add_axes((0, 0, 1, 1)), height)
    canvas.text(_BEFORE, 0.35, "before", size=13, weight="bold")
    canvas.text(_AFTER, 0.35, "after", size=13, weight="bold")
    y = 0.8
    for title, rows in grouped:
        y = _draw_model(canvas, title, rows, y)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "boundaries.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def groups(boundaries: Sequence[Boundary]) -> list[list[Boundary]]:
    """Forward boundaries, those together that one fused operation pays (neighbours with one merged kind)."""
    grouped: list[list[Boundary]] = []
    for boundary in boundaries:
        if boundary.direction != "forward":
            continue
        last = grouped[-1][-1] if grouped else None
        if last and boundary.rewrite == "merge_all_reduces" == last.rewrite and boundary.kind == last.kind:
            grouped[-1].append(boundary)
        else:
            grouped.append([boundary])
    return grouped


class _Canvas:
    """Axes in inches, y downwards."""

    def __init__(self, axes: Any, height: float):
        self.axes = axes
        axes.set_xlim(0, _WIDTH)
        axes.set_ylim(height, 0)
        axes.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 10, colour: str = _INK, **style: Any) -> None:
        self.axes.text(x, y, text, fontsize=size, color=colour, va="center", **style)

    def box(self, x: float, y: float, width: float, text: str, colour: str, height: float = _BOX) -> float:
        """A labelled box centred on `y`; returns its right edge."""
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=0.07"
        self.axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, style, facecolor=colour, linewidth=0))
        ink = _INK if colour == _COLOURS["left"] else "white"
        self.text(x + width / 2, y, text, size=10, colour=ink, ha="center")
        return x + width

    def arrow(self, x: float, y: float, to_x: float, to_y: float | None = None) -> None:
        style = {"arrowstyle": "-|>", "color": _FAINT, "linewidth": 1.1, "mutation_scale": 9}
        style |= {"shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", xy=(to_x, y if to_y is None else to_y), xytext=(x, y), arrowprops=style)

    def rule(self, y: float) -> None:
        self.axes.plot((0.3, _WIDTH - 0.3), (y, y), color="#e4e7eb", linewidth=1)


def _draw_model(canvas: _Canvas, title: str, rows: list[list[Boundary]], y: float) -> float:
    fused = [group for group in rows if group[0].fused]
    paid = sum(map(len, fused))
    canvas.rule(y)
    canvas.text(0.3, y + 0.35, title, size=12, weight="bold")
    canvas.text(_BEFORE, y + 0.35, f"{paid} all-reduces before {len(fused)} norms", size=10, colour=_FAINT)
    canvas.text(_AFTER, y + 0.35, f"{len(fused)} fused operations", size=10, colour=_FAINT)
    y += 0.7
    for group in rows:
        _draw_group(canvas, group, y)
        y += _ROW * len(group)
    return y + 0.15


def _draw_group(canvas: _Canvas, group: list[Boundary], y: float) -> None:
    lines = [y + _ROW * (index + 0.5) for index in range(len(group))]
    middle = sum(lines) / len(lines)
    first = group[0]
    steps = _steps(first)
    for boundary, line in zip(group, lines, strict=True):
        canvas.text(_BEFORE - _GAP - 0.05, line, boundary.module or "(unknown module)", size=9.5, ha="right")
        canvas.arrow(_BEFORE - _GAP, line, _BEFORE)
        colour = _COLOURS["collective"] if boundary.fused or boundary.feeds_norm else _COLOURS["left"]
        right = canvas.box(_BEFORE, line, 1.2, boundary.collective.replace("_", "-"), colour)
        if steps:
            canvas.arrow(right, line, right + _GAP, middle)
    left = _BEFORE + 1.2
    for index, (label, kind) in enumerate(steps):
        if index:
            canvas.arrow(left, middle, left + _GAP)
        left = canvas.box(left + _GAP, middle, 1.15, label, _COLOURS[kind])
    tall = _BOX + _ROW * (len(group) - 1)
    for line in lines:
        canvas.arrow(_AFTER - _GAP, line, _AFTER)
    if first.fused:
        behind = " + ".join(label.lstrip("+ ") for label, _ in steps)
        label = f"all-reduce + {behind}" if len(group) == 1 else f"one all-reduce for {len(group)}\n+ {behind}"
        edge = canvas.box(_AFTER, middle, 3.1, label, _COLOURS["fused"], tall)
    else:
        label = first.collective.replace("_", "-") + (", then norm" if first.feeds_norm else "") + ": unchanged"
        edge = canvas.box(_AFTER, middle, 3.1, label, _COLOURS["left"], tall)
    if first.norm:
        canvas.arrow(edge, middle, edge + _GAP)
        canvas.text(_CONSUMER - 0.04, middle, _consumer(first), size=9.5)


def _steps(boundary: Boundary) -> list[tuple[str, str]]:
    """What follows the collective up to the normed value, as (label, colour)."""
    if boundary.norm is None:
        return []
    norm = (_NAMES[boundary.norm], "norm")
    if boundary.kind.startswith("embedding"):
        return [norm]  # the residual stream begins here: nothing is added yet
    add = ("+ residual", "add")
    return [norm, add] if boundary.rewrite == "all_reduce_post_norm" else [add, norm]


def _consumer(boundary: Boundary) -> str:
    if boundary.kind.endswith("final_norm"):
        return "(final norm)"
    return boundary.kind.rpartition("→")[2].replace("dense_mlp", "dense MLP").replace("_", " ").replace("moe", "MoE")
