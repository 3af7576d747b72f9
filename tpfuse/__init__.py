"""tpfuse: fused all-reduce + residual + norm for tensor-parallel models under torch.compile."""

from . import ops
from .errors import (
    FusionError,
    OpError,
    OptionError,
    PeerTimeoutError,
    PlanError,
    PlanMismatchError,
    PolicyError,
    TPFuseError,
)
from .explain import explain, fuse_graph
from .kernels.all_reduce import init_workspace
from .parallelize import parallelize
from .policy import SharingPolicy
from .report import Boundary, Report, reports
from .roles import attention, dense_mlp, moe, share_tp_group
from .rows import rows
from .state import full_state_dict, load_full_state_dict

__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "FusionError",
    "OpError",
    "OptionError",
    "PeerTimeoutError",
    "PlanError",
    "PlanMismatchError",
    "PolicyError",
    "Report",
    "SharingPolicy",
    "TPFuseError",
    "attention",
    "dense_mlp",
    "explain",
    "full_state_dict",
    "fuse_graph",
    "init_workspace",
    "load_full_state_dict",
    "moe",
    "ops",
    "parallelize",
    "reports",
    "rows",
    "share_tp_group",
]
