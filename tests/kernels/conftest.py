"""What interpreted kernels need; `test_interpreted.py` runs them."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from .interpreter import patch_once_a_launch

    patch_once_a_launch()
