"""Runs one compiler and keeps what it said.

    python build_tools/run_nvcc.py LOG COMMAND...

LOG becomes all that was printed; what is no mere information about registers is printed here as well. Where the
compiler says that it makes products of wgmma wait for one another, or that setmaxnreg has no effect, the command has
failed: the kernel would be right, and several times slower.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# What `ptxas -v` has to say about every kernel. Information with a number in parentheses is a warning in disguise:
# products of wgmma that wait for one another, setmaxnreg that has no effect.
RESOURCE_USAGE = re.compile(
    r"^(ptxas|nvlink) info\s*: (?!.*(\(C\d|Performance Loss|setmaxnreg))|^\s+\d+ bytes stack frame, |^\s*$"
)
SLOW_KERNEL = re.compile(r"^ptxas (info|warning)\s*: \(C75\d\d\)", re.MULTILINE)


def warnings_in(output: str) -> list[str]:
    """What the compiler printed besides the use of resources."""
    return [line for line in output.splitlines() if not RESOURCE_USAGE.match(line)]


def main(log: str, *command: str) -> int:
    """Run the command; the exit status is its own, or 1 if what it made must not be used, and is removed."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    Path(log).write_text(result.stdout)
    for line in warnings_in(result.stdout):
        print(line, file=sys.stderr)
    if result.returncode == 0 and SLOW_KERNEL.search(result.stdout):
        print("error: this compiler makes a slow kernel of that (C75xx); CUDA 13.0 does not", file=sys.stderr)
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
        return 1
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
