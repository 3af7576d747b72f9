"""Every error tpfuse raises on purpose. Each names the value, what was allowed, and where the value came from."""

from __future__ import annotations

from collections.abc import Iterable

#: How an error begins that is raised again.
BEFORE = "an earlier call gave up, and the group was not set up anew since: "


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


class DeclarationError(TPFuseError, ValueError):
    """An operator was declared as a collective that it cannot be, or in two ways."""


class FusionError(TPFuseError):
    """`expect_fused` or `strict` was not met; the message holds the whole report."""


class PlanMismatchError(TPFuseError):
    """The ranks of one group compiled different plans for the same boundary, or entered it with different tensors.

    After it the group is of no more use: every later call raises this error again until the group is set up anew."""

    def again(self) -> PlanMismatchError:
        """The same finding for a call that came after it."""
        return PlanMismatchError(BEFORE + str(self).removeprefix(BEFORE))


class PeerTimeoutError(TPFuseError, TimeoutError):
    """A rank waited longer than allowed for a peer of its group; or the peer is gone.

    After it the group is of no more use: every later call raises this error again until the group is set up anew
    (docs/operations.md). Ranks are global ranks.

    Attributes:
        rank: the rank that waited; None if not known.
        group: the ranks of the group.
        boundary: where in the model, or ''. In a replayed CUDA graph: the boundaries that it may be.
        missing: the ranks whose data did not come, as far as known.
        seconds: the limit that was passed, or how long the rank waited; None if not known.
    """

    def __init__(
        self,
        message: str = "",
        *,
        rank: int | None = None,
        group: Iterable[int] = (),
        boundary: str = "",
        missing: Iterable[int] = (),
        seconds: float | None = None,
    ):
        super().__init__(message)
        self.rank, self.group, self.boundary = rank, tuple(group), boundary
        self.missing, self.seconds = tuple(missing), seconds

    def again(self) -> PeerTimeoutError:
        """The same finding for a call that came after it."""
        return PeerTimeoutError(
            BEFORE + str(self).removeprefix(BEFORE),
            rank=self.rank, group=self.group, boundary=self.boundary, missing=self.missing, seconds=self.seconds,
        )  # fmt: skip
