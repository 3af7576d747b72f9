"""Training with every rewrite follows eager mode's losses as closely as its own rounding lets any run follow them.

A few steps; `benchmarks/loss_curves.py` runs 200.
"""

import pytest
import torch

from .loss_curves import FORMS, apart, compared
from .ranks import run_processes
from .training_faults import OF_BACKWARD

STEPS = 12


CASES = [(form, dtype) for form in FORMS for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(
    ("form", "dtype"), [CASES[0], *(pytest.param(*case, marks=pytest.mark.nightly) for case in CASES[1:])], ids=str
)
def test_losses_are_those_of_eager_mode_and_a_fault_is_found(form, dtype):
    for found in run_processes(2, compared, form, dtype, STEPS, "aot_eager", 2):
        assert found.eager[-1] < 0.7 * found.eager[0], "it learns"
        assert found.fused.within and found.unfused.within, found
        assert set(found.faults) == set(OF_BACKWARD)
        for name, fault in found.faults.items():
            assert fault.share > 10, f"{name}: {fault}"


def test_a_curve_may_leave_as_controls_do_and_no_sooner():
    eager, control = [4.0, 2.0, 1.0, 1.0], [4.0, 2.0, 1.01, 1.0]
    assert apart([4.0, 2.0, 1.019, 1.019], eager, [control], 1e-6).within
    assert apart([4.0, 2.02, 1.0, 1.0], eager, [control], 1e-6).found_at == 1
    assert apart([4.0, 2.0, 1.0, 1.021], eager, [control], 1e-6).found_at == 3
    assert apart([4.0, 2.0, 1.0, 1.0], eager, [eager], 1e-6).within
