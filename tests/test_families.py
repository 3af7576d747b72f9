"""Model families: every all-reduce that feeds a norm is fused, or the family's own entry says what it would take.

The expected number is worked out by hand in families.py, confirmed by walks over the graph that know nothing of the
recogniser, and only then compared with what was fused. Matching only: a fake process group, nothing runs.
"""

from __future__ import annotations

import pytest
import torch

from .families import FAMILIES, HIDDEN, NAMED, Family, whole_model
from .family_graphs import trace_family
from .reachability import feeding_all_reduces

#: One family for each thing that may stand between a sum and a norm; the others, and more ranks, run nightly.
OFTEN = {
    ("llama", "decode"),
    ("gemma2", "inference"),  # scaled embedding, sandwich norms
    ("gpt_neox", "training"),  # parallel blocks
    ("opt", "decode"),  # biases behind the sums
    ("opt_dropout", "training"),  # random masks
    ("falcon", "training"),  # parallel blocks cut with parallelize_module
    ("deepseek_v3", "inference"),  # routed and shared experts
    ("olmo2", "inference"),  # norms before the addition only
}


def cells():
    for family in FAMILIES:
        for mode in family.modes:
            often = (family.name, mode) in OFTEN
            marks = () if often else (pytest.mark.nightly,)
            yield pytest.param(family, mode, 2, id=f"{family.name}-{mode}-2", marks=marks)
            if family in NAMED:
                yield pytest.param(family, mode, 8, id=f"{family.name}-{mode}-8", marks=pytest.mark.nightly)


@pytest.mark.parametrize(("family", "mode", "world"), cells())
def test_every_all_reduce_that_feeds_a_norm_is_fused(family: Family, mode: str, world: int):
    traced = trace_family(family.name, mode, world, whole_model(family, torch.bfloat16))
    walked = sum(len(feeding_all_reduces(graph.graph, HIDDEN)) for graph in traced.graphs)
    assert walked == family.feeding, "the number worked out by hand is not what the graph says"
    report = traced.report
    assert report.fused_forward == family.fused_in(mode), report
    assert len(report.missed) == family.feeding - family.fused_in(mode), report
    assert all(boundary.fused or boundary.reason for boundary in report.boundaries)
    assert not [b for b in report.fused if b.direction == "forward" and b.kind == "unknown"], report
