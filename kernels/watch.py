"""The older name of `kernels.symmetric.timeout`, for programs that import it."""

from .symmetric.timeout import *  # noqa: F403
