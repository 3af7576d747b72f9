"""Which releases of torch work; looked at before anything else of torch is used."""

from __future__ import annotations

import re
import warnings

import torch

from ..errors import TPFuseError

#: The releases of torch that the tests run on (`make test-matrix`): the first and the last.
OLDEST, NEWEST = (2, 11), (2, 15)


def check_torch_version(version: str = torch.__version__) -> None:
    """Refuse a release that is too old, and warn of one that nobody has tried yet.

    Raises:
        TPFuseError: naming the version, the oldest that works, and what to do.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else NEWEST
    if release < OLDEST:
        raise TPFuseError(
            f"tpfuse needs torch {_dotted(OLDEST)} or newer, and this is torch {version}: "
            f"pip install --upgrade 'torch>={_dotted(OLDEST)}'"
        )
    if release > NEWEST:
        warnings.warn(
            f"tpfuse was tested with torch {_dotted(OLDEST)} to {_dotted(NEWEST)}, and this is torch {version}; "
            "if it fails, look for a newer tpfuse",
            stacklevel=2,
        )


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


# Here, because every file that depends on a release imports this package before it uses anything.
check_torch_version()
