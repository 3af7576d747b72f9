"""In-place `dist.all_reduce` in graphs that keep the write: torch.export's."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import tpfuse

from ..graphs import on_ranks, relative_error

H = 16


class Block(nn.Module):
    """A row-wise linear, its sum in place, residual, norm; `read` says what of the partial sum is read afterwards."""

    def __init__(self, read: str = ""):
        super().__init__()
        self.linear, self.norm, self.read = nn.Linear(H, H, bias=False), nn.RMSNorm(H), read

    def forward(self, x, residual):
        y = self.linear(x)
        view = y.view(-1)
        before = y.abs().sum() if self.read == "before" else None
        dist.all_reduce(y)
        h = residual + y
        if self.read == "view":
            return self.norm(h), h, view * 2
        if self.read == "written":
            return self.norm(h), h, y.mul_(2)
        return (self.norm(h), h) if before is None else (self.norm(h), h, before)


def exported(block: nn.Module) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, tpfuse.Report]:
    """(the graph as exported, the graph as fused, the report)."""
    args = torch.randn(3, H), torch.randn(3, H)
    plain, changed = (torch.export.export(block, args).module() for _ in range(2))
    return plain, changed, tpfuse.fuse_graph(changed, strict=True)


def assert_same_numbers(plain, changed):
    x, residual = [torch.randn(3, H) for _ in range(4)], torch.randn(3, H)
    with torch.no_grad():
        for left, right in zip(on_ranks(plain, 4, x, residual), on_ranks(changed, 4, x, residual), strict=True):
            assert max(relative_error(right, left)) < 1e-6


def test_an_exported_in_place_sum_is_fused(four_ranks):
    plain, changed, report = exported(Block())
    assert [boundary.rewrite for boundary in report.boundaries] == ["all_reduce_norm"]
    assert torch.ops.aten.copy_.default not in {node.target for node in changed.graph.nodes}
    assert_same_numbers(plain, changed)


def test_reading_the_partial_sum_before_it_is_overwritten_does_not_matter(four_ranks):
    plain, changed, report = exported(Block("before"))
    assert len(report.fused) == 1
    assert_same_numbers(plain, changed)


def test_a_view_that_sees_the_sum_keeps_the_write(four_ranks):
    plain, changed, report = exported(Block("view"))
    assert not report.fused and report.boundaries[0].reason
    assert_same_numbers(plain, changed)


def test_a_sum_that_is_written_to_again_keeps_its_numbers(four_ranks):
    plain, changed, _ = exported(Block("written"))
    assert_same_numbers(plain, changed)


def test_a_norm_of_the_sum_itself(four_ranks):
    class Plain(nn.Module):
        def forward(self, x, residual):
            y = x @ residual.t()
            dist.all_reduce(y)
            return F.layer_norm(y, y.shape[-1:])

    plain, changed, report = exported(Plain())
    assert len(report.fused) == 1
    assert_same_numbers(plain, changed)
