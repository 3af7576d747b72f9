"""Why something stays as it is: a code that programs compare, and a sentence that people read.

A sentence may be worded anew at any time, and nothing may depend on how it is. Whoever has to know which refusal it is
asks for its code; the codes stand here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from torch import fx


class Code(str, Enum):
    """What kind of reason it is. Reports carry the value (`Boundary.code`)."""

    # Of the collective or the graph it stands in.
    COLLECTIVE = "collective"  # in a form that no pass may touch
    BACKWARD = "backward"  # in the backward pass, where nothing meets it
    TRAINING = "training"  # what is done in inference graphs only
    NO_REWRITE = "no_rewrite"  # a kind of collective that no rewrite applies to
    SUBGRAPH = "subgraph"  # inside the graph of a higher-order operator
    INTERNAL_ERROR = "internal_error"

    # Of what reads it.
    LEAVES = "leaves"  # its value leaves the graph before any norm reads it
    NO_NORM = "no_norm"
    NORM = "norm"  # a norm that is not recognised or cannot be fused
    READ_FIRST = "read_first"  # something needs the sum before any norm does
    BETWEEN = "between"  # what stands between the collective and the norm
    SPREADS = "spreads"  # its rows are repeated before the norm

    # Of the place.
    VALUES = "values"  # a tensor of the boundary is no plain one, or on another device
    RANKS = "ranks"  # what would move in front of the sum may differ between ranks
    ROUNDING = "rounding"  # another order of steps would round more, or overflow
    USED_TWICE = "used_twice"  # the sum is used in another way, too
    DEPENDS = "depends"  # what the norm reads besides is made of the sum
    MOVES_PAST = "moves_past"  # a write, a mode or a random number that nothing may move past
    ASTRIDE = "astride"  # an activation checkpoint cuts the boundary in two, until the graph is split
    APART = "apart"  # it meets another collective, and the two cannot be one

    # Of what was decided.
    SWITCHED_OFF = "switched_off"
    MERGE_OFF = "merge_off"  # the same of merge_all_reduces, which would add it to another one
    AS_WRITTEN = "as_written"  # all ranks keep what they send as the program wrote it
    LAYOUT_STAYS = "layout_stays"  # the residual stream keeps its layout here
    LAYOUT_CHANGED = "layout_changed"  # the collective is another one now, and not fused
    FACTORS_COST_MORE = "factors_cost_more"  # one collective over the whole group is cheaper than two


@dataclass(frozen=True)
class Refusal:
    """One reason. sentence: complete, in plain words, about something a user can act on. at: the operator that it
    speaks of, whose place in the program a report adds. by: another one, which reads what `at` reads."""

    code: Code
    sentence: str
    at: fx.Node | None = None
    by: fx.Node | None = None

    def worded(self, sentence: str) -> Refusal:
        """The same refusal in other words."""
        return replace(self, sentence=sentence)


def refused(code: Code, sentence: str) -> Refusal | None:
    """A refusal where there is a sentence, else None: finders answer with one sentence or ''."""
    return Refusal(code, sentence) if sentence else None
