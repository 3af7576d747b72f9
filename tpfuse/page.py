"""A report as a page for a browser: the picture of its boundaries before and after, and the table; no scripts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from .report import Boundary, Report, size_in_words

_STYLE = """body{font:14px/1.45 system-ui,sans-serif;color:#1f2933;margin:2em auto;max-width:1180px;padding:0 1em}
h1{font-size:20px}table{border-collapse:collapse;width:100%;font-size:12.5px}
td,th{border-bottom:1px solid #e4e7eb;padding:4px 8px;text-align:left;vertical-align:top}
td:nth-child(5),td:nth-child(6){white-space:nowrap}
th{background:#f5f7fa}.left td{color:#7b8794}li{margin:3px 0}svg{width:100%;height:auto}pre{white-space:pre-wrap}"""
_FUSED, _COLLECTIVE, _ADD, _NORM, _LEFT = "#2a9d6f", "#e8743b", "#8e9aaf", "#3d7dca", "#d9dee5"
_ROW, _WIDTH = 34, 1140


def page(
    report: Report,
    title: str = "tpfuse",
    times: Mapping[int, int] | None = None,
    names: Mapping[int, str] | None = None,
    more: Sequence[str] = (),
) -> str:
    """The page. times: how often the boundary of that number stands in the model, where it was traced once for several
    layers. names: what its module is called then. more: paragraphs of text under the picture, as they are."""
    times, names = times or {}, names or {}
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(report.summary())}</p>",
        _picture(report.boundaries, times, names),
        *(f"<pre>{html.escape(text)}</pre>" for text in more),
        _table(report.boundaries, times, names),
        "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in report.notes) + "</ul>" if report.notes else "",
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _picture(boundaries: Sequence[Boundary], times: Mapping[int, int], names: Mapping[int, str]) -> str:
    """One row for each forward collective: what followed what, and what it is now."""
    rows = [(i, b) for i, b in enumerate(boundaries) if b.direction == "forward"]
    height = 30 + _ROW * len(rows)
    out = [f"<svg viewBox='0 0 {_WIDTH} {height}' font-family='system-ui,sans-serif' font-size='12'>"]
    out += [_text(360, 16, "before", "font-weight='bold'"), _text(760, 16, "after", "font-weight='bold'")]
    for line, (index, boundary) in enumerate(rows):
        y = 30 + _ROW * line
        name = (names.get(index) or boundary.module or "(unknown module)") + _by(times.get(index, 1))
        out.append(_text(345, y + 17, name, "text-anchor='end'"))
        steps = [(f"{_words(boundary.collective)} {ranks_in_words(boundary.group)}", _COLLECTIVE)]
        if boundary.norm is not None:
            residual = [] if boundary.kind.startswith("embedding") else [("+ residual", _ADD)]
            norm = [(_words(boundary.norm), _NORM)]
            steps += norm + residual if boundary.rewrite == "all_reduce_post_norm" else residual + norm
        x = 360
        for label, colour in steps:
            colour = colour if boundary.fused or boundary.feeds_norm else _LEFT
            width = 140 if label == steps[0][0] else 92
            out += [_box(x, y, width, label, colour)]
            x += width + 8
        after = " + ".join(_words(t.collective) for t in boundary.after) or "nothing is sent"
        if boundary.fused and boundary.norm is not None:
            after += f" + {_words(boundary.norm)}, fused"
        out.append(_box(760, y, 260, after if boundary.fused else "unchanged", _FUSED if boundary.fused else _LEFT))
        out.append(_text(1032, y + 17, boundary.kind.rpartition("→")[2].replace("_", " ").replace("unknown", "")))
    return "\n".join([*out, "</svg>"])


def _table(boundaries: Sequence[Boundary], times: Mapping[int, int], names: Mapping[int, str]) -> str:
    head = ("#", "kind", "module", "ranks", "bytes a rank sends before", "after", "rows", "rewrite", "reason")
    rows = ["<table><tr>" + "".join(f"<th>{word}</th>" for word in head) + "</tr>"]
    for i, b in enumerate(boundaries):
        back = " (backward)" if b.direction == "backward" else ""
        cells = (str(i), b.kind + back, (names.get(i) or b.module or "-") + _by(times.get(i, 1)),
                 ranks_in_words(b.group), size_in_words(b.bytes_before), size_in_words(b.bytes_after),
                 b.layout_out or "-", b.rewrite or "-", b.reason)  # fmt: skip
        shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr{'' if b.fused else ' class=left'}>{shown}</tr>")
    return "\n".join([*rows, "</table>"])


def ranks_in_words(group: Sequence[int]) -> str:
    ranks = list(group)
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}–{ranks[-1]}"
    return ",".join(map(str, ranks)) or "?"


def _by(count: int) -> str:
    return f"  ×{count}" if count != 1 else ""


def _words(name: str) -> str:
    return name.replace("_", "-")


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f"<text x='{x}' y='{y}' fill='#1f2933' {style}>{html.escape(text)}</text>"


def _box(x: float, y: float, width: float, label: str, colour: str) -> str:
    ink = "#1f2933" if colour == _LEFT else "white"
    return (
        f"<rect x='{x}' y='{y}' width='{width}' height='25' rx='5' fill='{colour}'/>"
        f"<text x='{x + width / 2}' y='{y + 17}' text-anchor='middle' fill='{ink}'>{html.escape(label)}</text>"
    )
