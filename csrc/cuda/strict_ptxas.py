"""Runs a CUDA compilation, and fails where the assembler says that a kernel would be slow: ``strict_ptxas.py NVCC ...``

That wgmma instructions are serialised (ptxas's messages C7508 to C7519) is an information to ptxas, not an error, and
spills are a warning.
"""

import re
import subprocess
import sys

SLOW = re.compile(rb"\(C75\d\d\)|Registers are spilled|Local memory used")


def main() -> int:
    done = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE, check=False)
    sys.stderr.buffer.write(done.stderr)
    return done.returncode or int(bool(SLOW.search(done.stderr)))


if __name__ == "__main__":
    sys.exit(main())
