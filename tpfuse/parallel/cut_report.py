"""What `parallelize` cut, what it left whole, and how much of the weights this rank holds."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn as nn

from tpfuse.errors import PolicyError
from tpfuse.parallel.cuts import Cut

log = logging.getLogger(__name__)

_MIXERS = re.compile(r"attn|attention|mixer|mamba|conv|linear_attn|ssm")


@dataclass(frozen=True)
class Part:
    """Parameters of one name pattern (`model.layers.*.mlp.down_proj`).

    Args:
        modules: how many modules have the pattern.
        how: the cut in words, "whole" where nothing is cut.
        whole_bytes, own_bytes: their weights in the uncut model, and on this rank.
    """

    pattern: str
    modules: int
    how: str
    whole_bytes: int
    own_bytes: int


@dataclass(frozen=True)
class CutReport:
    """`cut`, `whole`: the parts that are cut, and those that are not, in the model's order."""

    model: str
    cut: tuple[Part, ...]
    whole: tuple[Part, ...]

    @property
    def whole_bytes(self) -> int:
        """The uncut model's weights."""
        return sum(part.whole_bytes for part in (*self.cut, *self.whole))

    @property
    def own_bytes(self) -> int:
        """This rank's weights."""
        return sum(part.own_bytes for part in (*self.cut, *self.whole))

    @property
    def share(self) -> float:
        """This rank's share of the weights, from 0 to 1."""
        return self.own_bytes / max(self.whole_bytes, 1)

    @property
    def whole_mixers(self) -> tuple[str, ...]:
        """Patterns of attention and mixer weights (not norms or biases) that every rank holds whole."""
        return tuple(p.pattern for p in self.whole if _MIXERS.search(p.pattern) and p.how == "whole")

    def summary(self) -> str:
        """One line."""
        text = (
            f"{self.model}: this rank holds {_size(self.own_bytes)} of {_size(self.whole_bytes)} ({self.share:.0%} of "
            f"the weights); {sum(p.modules for p in self.cut)} modules are cut, "
            f"{sum(p.modules for p in self.whole)} whole"
        )
        mixers = sorted({_owner(pattern) for pattern in self.whole_mixers})
        return text + (f"; attention or mixers stay whole: {', '.join(mixers)}" if mixers else "")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        width = shutil.get_terminal_size((100, 24)).columns
        rows = [("modules", "n", "how", "share")]
        for part in (*self.cut, *self.whole):
            share = part.whole_bytes / max(self.whole_bytes, 1)
            rows.append((part.pattern, str(part.modules), part.how, f"{share:.1%}"))
        fixed = max(len(r[1]) for r in rows) + max(len(r[3]) for r in rows) + 6
        how = min(max(len(r[2]) for r in rows), max((width - fixed) // 2, 8))
        name = min(max(len(r[0]) for r in rows), max(width - fixed - how, 8))
        lines = [
            f"{_fit(a, name):{name}}  {b:>{max(len(r[1]) for r in rows)}}  {_fit(c, how):{how}}  {d:>6}".rstrip()
            for a, b, c, d in rows
        ]
        return "\n".join([self.summary(), "", *lines])


def cut_report(model: nn.Module) -> CutReport:
    """What was cut and what was left whole. No communication; this rank's view.

    Raises:
        PolicyError: for a model that was not parallelized.
    """
    state = getattr(model, "_tpfuse", None)
    if state is None:
        raise PolicyError(f"cut_report: {type(model).__name__} was not parallelized; call tpfuse.parallelize first")
    modules = dict(model.named_modules())
    # pattern, how -> owners, whole bytes, own bytes
    parts: dict[tuple[str, str], tuple[set[str], list[int]]] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        bare = not isinstance(modules[owner], (nn.Linear, nn.Embedding)) and parameter.ndim > 1
        cut = state.cuts.get(name)
        own = parameter.numel() * parameter.element_size()
        whole = own if cut is None else own // max(parameter.shape[cut.dim], 1) * sum(cut.parts)
        how = "whole" if parameter.ndim > 1 or cut is not None else "whole (norm, bias)"
        if cut is not None and cut.size > 1:
            how = _how(cut, parameter.ndim)
        elif parameter.ndim == 1 and (_first_cut(name, owner, state.cuts)):
            how = "whole (bias)"
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name if bare else owner), how)
        owners, sizes = parts.setdefault(key, (set(), [0, 0]))
        owners.add(owner)
        sizes[0] += whole
        sizes[1] += own
    found = [Part(pattern, len(o), how, *sizes) for (pattern, how), (o, sizes) in parts.items()]
    return CutReport(
        type(model).__name__,
        tuple(p for p in found if not p.how.startswith("whole")),
        tuple(p for p in found if p.how.startswith("whole")),
    )


def _first_cut(name: str, owner: str, cuts) -> bool:
    return name.endswith("bias") and f"{owner}.weight" in cuts


def log_summary(model: nn.Module, left: Mapping[str, str]) -> None:
    """One line at INFO; at WARNING where more than half of the weights outside of embeddings stay whole. `left`: why
    modules with a role stay whole, by name."""
    for reason in dict.fromkeys(left.values()):
        log.info("left whole: %s", reason)
    report = cut_report(model)
    inner = [p for p in (*report.cut, *report.whole) if not re.search(r"embed|lm_head|wte", p.pattern)]
    total = sum(p.whole_bytes for p in inner)
    uncut = sum(p.whole_bytes for p in inner if p.how.startswith("whole"))
    record: Any = model._tpfuse
    mostly = total > 0 and uncut > total / 2 and record.groups.whole.size > 1
    log.log(logging.WARNING if mostly else logging.INFO, "parallelized %s", report.summary())


def _how(cut: Cut, ndim: int) -> str:
    if ndim > 2:
        style = "experts"
    elif cut.dim == 0:
        style = "colwise" if len(cut.parts) == 1 else f"packed {len(cut.parts)}"
    else:
        style = "rowwise"
    shared = "" if cut.disjoint else ", neighbours share"
    return f"{style}, {cut.over} {cut.size}{shared}"


def _owner(pattern: str) -> str:
    return pattern.rpartition(".")[0] or pattern


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[-(width - 1) :]
