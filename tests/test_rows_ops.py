"""The row ops by themselves: values, gradients, fakes and opcheck."""

import pytest
import torch

from tpfuse.errors import PolicyError
from tpfuse.parallel.rows import announced_rows, cut_rows, rows, trim_rows


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (0, 3), (1, 3), (2, 0, 3)])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_cut_rows_is_the_padded_chunk(shape, parts):
    x = torch.randn(shape, dtype=torch.float64)
    flat = x.reshape(-1, 3)
    chunk = -(-len(flat) // parts)
    padded = torch.cat([flat, flat.new_zeros(chunk * parts - len(flat), 3)])
    for index in range(parts):
        own = cut_rows(x, parts, index)
        assert torch.equal(own, padded[index * chunk : (index + 1) * chunk])
        assert own.numel() == 0 or own.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("index", [0, 1, 3])
def test_ops_pass_opcheck_and_gradcheck(index):
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.tpfuse.cut_rows.default, (x, 4, index))
    assert torch.autograd.gradcheck(lambda t: cut_rows(t, 4, index), x)
    flat = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.tpfuse.trim_rows.default, (flat, index))
    assert torch.autograd.gradcheck(lambda t: trim_rows(t, index), flat)


def test_ops_trace_with_dynamic_rows_as_single_nodes():
    seen = []

    def backend(graph, inputs):
        seen.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def run(x):
        return trim_rows(cut_rows(x, 2, 1), x.shape[0] // 2)

    for n in (6, 9, 0):
        x = torch.randn(n, 3)
        assert torch.equal(run(x), cut_rows(x, 2, 1)[: n // 2])
    assert len(seen) <= 2  # one dynamic graph, and at most one more for the zero
    assert all(sum("tpfuse.cut_rows" in n for n in nodes) == 1 for nodes in seen)


def test_rows_context_nests_and_restores():
    assert announced_rows() is None
    with rows((5, 3)):
        with rows([0, 1]):
            assert announced_rows() == (0, 1)
        assert announced_rows() == (5, 3)
    assert announced_rows() is None


@pytest.mark.parametrize("bad", [(), (-1, 2), (True, 1), (1.0, 2), ("5", 3), 3])
def test_bad_counts_are_refused(bad):
    with pytest.raises(PolicyError, match="one integer >= 0"), rows(bad):
        pass


def test_a_different_announcement_recompiles():
    frames = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=frames, fullgraph=True)
    def run(x):
        counts = announced_rows()
        return x + (sum(counts) if counts else 0)

    zero = torch.zeros(1)
    for counts in ((5, 3), (3, 5), (1, 1), (5, 3)):
        with rows(counts):
            assert run(zero).item() == sum(counts)
    assert run(zero).item() == 0
