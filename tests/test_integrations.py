"""Other tools' own layers, where the package is installed."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tpfuse

from .graphs import fake_world

HIDDEN = 16


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_megatron_cores_linear_layers(monkeypatch):
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    class Block(nn.Module):
        def __init__(self, config, group):
            super().__init__()
            ways = {"config": config, "init_method": nn.init.xavier_normal_, "tp_group": group}
            self.up = ColumnParallelLinear(HIDDEN, 2 * HIDDEN, bias=False, gather_output=False, **ways)
            self.down = RowParallelLinear(
                2 * HIDDEN, HIDDEN, bias=True, input_is_parallel=True, skip_bias_add=True, **ways
            )
            self.norm = nn.LayerNorm(HIDDEN)

        def forward(self, x):
            output, bias = self.down(F.gelu(self.up(x)[0]))
            return self.norm(x + output + bias)

    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    ignored = torch._dynamo.config.ignore_logging_functions | {warnings.warn}
    with fake_world(2), torch.no_grad(), torch._dynamo.config.patch(ignore_logging_functions=ignored):
        parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
        try:
            config = ModelParallelConfig(tensor_model_parallel_size=2, use_cpu_initialization=True)
            block = Block(config, parallel_state.get_tensor_model_parallel_group())
            report = tpfuse.explain(block, (torch.randn(3, 2, HIDDEN),))
        finally:
            parallel_state.destroy_model_parallel()
    assert [b.fused for b in report.boundaries] == [True] and not report.missed, report
