"""On GPUs, in real processes: launches from records give the bits of the first call, by themselves and in graphs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.models import HIDDEN, Stack, cut_from
from tests.passes.test_quantised import recognised
from tests.quantisations import float8_per_row, int8_per_row

from .lean_checks import Firsts, another_device_is_current, quantised_calls, records_give_the_bits_of_the_first_call
from .test_gpu_backend import BF16, WORLD, here, ranks  # noqa: F401

pytestmark = pytest.mark.gpu


def run_checks(rank: int) -> int:
    device, name = here(rank), dist.group.WORLD.group_name
    made = records_give_the_bits_of_the_first_call(device, name)
    another_device_is_current(device, name)
    return made


def test_a_call_from_a_record_gives_the_bits_of_the_first(ranks) -> None:  # noqa: F811
    assert ranks(run_checks) == [15, 15]


def run_quantised(rank: int, quant: str) -> bool:
    quantised_calls(here(rank), dist.group.WORLD.group_name, quant)
    return True


@pytest.mark.parametrize("spelling", [float8_per_row, int8_per_row])
def test_a_quantised_call_from_a_record_gives_the_bits_of_the_first(ranks, spelling) -> None:  # noqa: F811
    assert ranks(run_quantised, recognised(spelling).text()) == [True, True]


def run_model(rank: int, dynamic: bool, train: bool) -> dict:
    """A compiled model twice on the same rows, with other rows between."""
    from tpfuse import backend

    device = here(rank)
    torch.manual_seed(0)
    model = cut_from(Stack(1, "none", norm=nn.RMSNorm).to(BF16), rank, WORLD, "funcol").to(device)
    fn = torch.compile(model, backend=backend.tpfuse, fullgraph=True, dynamic=dynamic)
    rows = (5, 9, 5, 9) if dynamic else (5, 5, 5)
    seen: dict[int, list] = {}
    with Firsts() as firsts, torch.set_grad_enabled(train):
        for count in rows:
            x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count)).to(device, BF16)
            out = fn(x)
            if train:
                model.zero_grad()
                out.float().square().mean().backward()
            found = [out.detach(), *(p.grad.clone() for p in model.parameters() if train)]
            seen.setdefault(count, []).append(found)
    same = all(torch.equal(a, b) for each in seen.values() for a, b in zip(each[0], each[-1], strict=True))
    return {"same": same, "firsts": firsts.count}


@pytest.mark.parametrize(("dynamic", "train"), [(False, False), (True, False), (True, True)])
def test_a_compiled_model_launches_its_boundaries_again(ranks, dynamic, train) -> None:  # noqa: F811
    for result in ranks(run_model, dynamic, train):
        assert result["same"] and 0 < result["firsts"] <= (4 if not dynamic else 8)
