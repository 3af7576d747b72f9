"""What every fused operation of a rewritten graph is told, whatever it stands for."""

from __future__ import annotations

from torch import fx

from ..recognise.streams import calls

_NORMS = ("tpfuse::all_reduce_norm", "tpfuse::reduce_scatter_norm")
_OVERLAPPED = (*_NORMS, "tpfuse::all_reduce_norm_backward", "tpfuse::reduce_scatter_norm_backward")


def tell(graph: fx.Graph, batch_invariant: bool, overlap: bool) -> None:
    """Both decide which kernels run, and are compared between the ranks."""
    for node in graph.nodes:
        if batch_invariant and any(calls(node, name) for name in _NORMS):
            node.update_kwarg("batch_invariant", True)
        if overlap and any(calls(node, name) for name in _OVERLAPPED):
            node.update_kwarg("overlap", True)
