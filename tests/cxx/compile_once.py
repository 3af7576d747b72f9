"""What g++ makes of the same source with the same options is kept for a run of the tests.

Tests begin with empty compile caches, so that each of them traces and rewrites for itself; Inductor's kernels are the
same ones in many of them, and g++ takes two seconds for one. Everything but one source that becomes one shared object
goes to g++ as it is.
"""

import hashlib
import os
import shutil
import subprocess
import sys

STORE = os.environ["TPFUSE_TESTS_COMPILED"]


def main(arguments: list[str]) -> int:
    sources = [a for a in arguments if a.endswith(".cpp")]
    if len(sources) != 1 or "-shared" not in arguments or "-o" not in arguments:
        return subprocess.call(["g++", *arguments])
    output = arguments[arguments.index("-o") + 1]
    with open(sources[0], "rb") as file:
        key = hashlib.sha256(file.read())
    key.update("\0".join(a for a in arguments if a not in (sources[0], output)).encode())
    kept = os.path.join(STORE, key.hexdigest())
    if not os.path.exists(kept):
        status = subprocess.call(["g++", *arguments])
        if status:
            return status
        os.makedirs(STORE, exist_ok=True)
        shutil.copyfile(output, f"{kept}.{os.getpid()}")
        os.replace(f"{kept}.{os.getpid()}", kept)  # whole, whoever else writes it
    else:
        shutil.copyfile(kept, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
