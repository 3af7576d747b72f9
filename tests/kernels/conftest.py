"""What interpreted kernels need; `test_interpreted.py` runs them."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter

    interpreter.patch_once_a_launch()
    interpreter.check_overflow_in_debug_mode_only()
    interpreter.rest_between_polls()
