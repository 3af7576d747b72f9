"""tpfuse: fused all-reduce + residual + norm for tensor-parallel models under torch.compile."""

from . import ops
from .declared import register_all_reduce
from .errors import (
    DeclarationError,
    FusionError,
    OpError,
    OptionError,
    PeerTimeoutError,
    PlanError,
    PlanMismatchError,
    PolicyError,
    TPFuseError,
    VerifyError,
)
from .explain import explain, fuse_graph
from .kernels.entry import check_peers, init_workspace
from .parallel.clip import clip_grad_norm_
from .parallel.cut_report import CutReport, cut_report
from .parallel.parallelize import parallelize
from .parallel.roles import attention, dense_mlp, moe, share_tp_group
from .parallel.rows import rows
from .parallel.state_dict import full_state_dict, load_full_state_dict
from .parallel.verify import verify
from .policy import SharingPolicy
from .report import Boundary, Report, reports

__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "CutReport",
    "DeclarationError",
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
    "VerifyError",
    "attention",
    "check_peers",
    "clip_grad_norm_",
    "cut_report",
    "dense_mlp",
    "explain",
    "full_state_dict",
    "fuse_graph",
    "init_workspace",
    "load_full_state_dict",
    "moe",
    "ops",
    "parallelize",
    "register_all_reduce",
    "reports",
    "rows",
    "share_tp_group",
    "verify",
]
