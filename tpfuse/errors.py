"""Every error tpfuse raises on purpose. Each names the value, what was allowed, and where the value came from."""

from __future__ import annotations


class TPFuseError(Exception):
    """Base of all errors raised by tpfuse."""


class OptionError(TPFuseError, ValueError):
    """An option of the backend, or a field of a table or report read from JSON, is unknown or has a value that is not
    allowed."""


class PolicyError(TPFuseError, ValueError):
    """A sharing policy cannot work, or disagrees with the mesh, the model or another policy."""


class PlanError(TPFuseError, ValueError):
    """A sharding plan or a role names a module or a cut that the model does not allow."""


class VerifyError(TPFuseError):
    """A module of a parallelized model gives another output or gradient than the uncut one; names module and tensor."""


class OpError(TPFuseError, ValueError):
    """A functional op was called with tensors, a group or an eps that it cannot take."""


class FusionError(TPFuseError):
    """`expect_fused` or `strict` was not met; the message holds the whole report."""


class PlanMismatchError(TPFuseError):
    """The ranks of one group compiled different plans for the same boundary, or entered it with different tensors."""


class PeerTimeoutError(TPFuseError, TimeoutError):
    """A rank waited longer than allowed for a peer of its group; or the peer is gone; names group, rank
    and boundary, and in the symmetric-memory kernels the epoch."""
