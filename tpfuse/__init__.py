"""tpfuse: fused all-reduce + residual + norm for tensor-parallel models under torch.compile."""

from . import ops
from .errors import (
    FusionError,
    OpError,
    OptionError,
    PlanError,
    PlanMismatchError,
    PolicyError,
    TPFuseError,
)
from .explain import explain, fuse_graph
from .policy import SharingPolicy
from .report import Boundary, Report, reports

__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "FusionError",
    "OpError",
    "OptionError",
    "PlanError",
    "PlanMismatchError",
    "PolicyError",
    "Report",
    "SharingPolicy",
    "TPFuseError",
    "explain",
    "fuse_graph",
    "ops",
    "reports",
]
